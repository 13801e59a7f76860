// Players with a line at the position that is heard, and the sound of music that is still being generated.
const players = () => [...element.querySelectorAll("audio")];

element.addEventListener("click", (event) => {
  if (event.target.closest(".cancel")) {
    stopLive();
    trigger("cancel");
  }
  const picture = event.target.closest(".picture");
  if (picture) {
    const audio = picture.closest(".piece").querySelector("audio");
    audio.currentTime = ((event.clientX - picture.getBoundingClientRect().left) / picture.clientWidth) * audio.duration;
    audio.play();
  }
});

// Events of players do not bubble; they are caught on the way down.
element.addEventListener("play", (event) => {
  stopLive();
  players().filter((audio) => audio !== event.target).forEach((audio) => audio.pause());
  const line = event.target.closest(".piece").querySelector(".picture i");
  const move = () => {
    line.style.opacity = 1;
    line.style.left = `${(100 * event.target.currentTime) / event.target.duration}%`;
    if (!event.target.paused) requestAnimationFrame(move);
  };
  move();
}, true);

let live = null;
let isStopped = false; // by Cancel, or by a player; until the next request

function stopLive() {
  if (live) live.context.close();
  live = null;
  isStopped = true;
}

function playChunks({ chunks = [], sample_hz, running }) {
  if (running && !chunks.length) {
    stopLive();
    isStopped = false;
  }
  if (isStopped || !chunks.length) return;
  live ??= { context: new AudioContext(), last: -1, end: 0 };
  for (const { number, samples } of chunks.filter(({ number }) => number > live.last)) {
    const words = new Int16Array(Uint8Array.from(atob(samples), (letter) => letter.charCodeAt(0)).buffer);
    const buffer = live.context.createBuffer(1, words.length, sample_hz);
    buffer.copyToChannel(Float32Array.from(words, (word) => word / 32768), 0);
    const source = live.context.createBufferSource();
    source.buffer = buffer;
    source.connect(live.context.destination);
    source.start((live.end = Math.max(live.end, live.context.currentTime + 0.1)));
    live.end += buffer.duration;
    live.last = number;
    element.dataset.played = number + 1;
  }
}

// Gradio refuses other types of files in a message that disappears, and the music would ignore the recording. The server
// refuses them in place of the music, and accepts sound of which the browser does not know the type.
function asAudio(files) {
  const data = new DataTransfer();
  for (const file of files) data.items.add(new File([file], file.name, { type: "audio/wav" }));
  return data;
}

document.addEventListener("change", ({ target }) => {
  if (target.type === "file") target.files = asAudio(target.files).files;
}, true);

document.addEventListener("drop", (event) => {
  const { files } = event.dataTransfer;
  if ([...files].every((file) => file.type === "audio/wav") || !event.target.closest(".recording")) return;
  event.preventDefault();
  event.stopPropagation();
  const dataTransfer = asAudio(files);
  event.target.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
}, true);

let wasRunning;

watch("value", () => {
  const value = props.value || {};
  playChunks(value);
  // On a narrow window the result is below the form.
  const isNew = value.running !== wasRunning || value.error;
  if (isNew && window.innerWidth < 768) element.scrollIntoView({ behavior: "smooth" });
  wasRunning = value.running;
});
