"""The web page and its HTTP API (extra [web]): `musiclm web`, or `MusicServer` in a program."""
