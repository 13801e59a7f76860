"""File formats of audio: suffixes that can be read and written, and reasons why a file cannot be read."""

from audiolm_pytorch.checks.damage import LFS_POINTER, POINTER_REASON

__all__ = [
    "AUDIO_SUFFIXES",
    "MAX_MP3_CHANNELS",
    "MP3_RATES_HZ",
    "OTHER_AUDIO_SUFFIXES",
    "WRITE_SUBTYPES",
    "unreadable_reason",
]

# Suffixes of the formats that libsndfile can decode.
AUDIO_SUFFIXES = tuple(".wav .wave .flac .mp3 .ogg .oga .opus .aiff .aif .aifc .au .snd .caf .rf64 .w64 .sph".split())
# Suffixes of audio and video that libsndfile cannot decode, and of unfinished downloads.
OTHER_AUDIO_SUFFIXES = tuple(".m4a .m4b .aac .mp4 .mov .webm .mka .mkv .wma .wv .ape .amr .ac3 .mpc .ra .part".split())
# Suffixes of the formats that can be written, with the encoding of libsndfile.
WRITE_SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16", ".ogg": "VORBIS", ".mp3": "MPEG_LAYER_III"}
MP3_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
MAX_MP3_CHANNELS = 2

_CONVERT = "convert it first, e.g. with ffmpeg -i NAME.{} NAME.wav"
# First bytes of formats that libsndfile does not read.
_FOREIGN = {
    b"\x1aE\xdf\xa3": f"it is a WebM or Matroska file; {_CONVERT.format('webm')}",
    b"0&\xb2u": f"it is a WMA file; {_CONVERT.format('wma')}",
    b"\xff\xf1": f"it is an AAC file; {_CONVERT.format('aac')}",
    b"\xff\xf9": f"it is an AAC file; {_CONVERT.format('aac')}",
    b"PK\x03\x04": "it is a zip archive; unpack it",
    b"\x1f\x8b": "it is a gzip archive; unpack it",
    b"%PDF": "it is a PDF document",
    b"\x89PNG": "it is a picture",
    b"\xff\xd8\xff": "it is a picture",
    LFS_POINTER: f"it {POINTER_REASON}",
}
# libsndfile returns these for every file whose format it does not recognise.
_VAGUE_ERRORS = ("File does not exist", "System error", "Format not recognised", "No error")


def unreadable_reason(head: bytes, num_bytes: int, library_error: str) -> str:
    """Return why libsndfile cannot read a file, from its first bytes, its size and the library's error."""
    if head[:3] == b"ID3" and len(head) >= 10:
        # Four digits of seven bits (https://id3.org/id3v2.4.0-structure, section 3.1)
        tag_bytes = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
        if num_bytes <= tag_bytes:
            return "it has an ID3 tag and no audio; download or create it again"
    for magic, reason in _FOREIGN.items():
        if head.startswith(magic):
            return reason
    if head[4:8] == b"ftyp":
        return f"it is an MP4 or M4A file; {_CONVERT.format('m4a')}"
    if not head.strip(b"\0"):
        return "it begins with zeros; download or create it again"
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if begin.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page; download the file again"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head) and _is_utf8(head):
        return "it is a text file"
    if any(library_error.startswith(vague) for vague in _VAGUE_ERRORS):
        return "its format is not recognised"
    return library_error


def _is_utf8(data: bytes) -> bool:
    """Return whether the bytes are UTF-8 text, of which the last character may be cut."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(data) - 3
    return True
