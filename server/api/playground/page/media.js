// The image or video that is asked about: from a file, a drop, the clipboard, or the built-in scene.

import { address } from "./api.js";

const SCENE = "playground/scene.png";

const LONG_SIDE = 960; // of a video's frames: all that the server takes are kept

// {url: data URL, kind: "image" | "video", extension, frame(seconds): the picture that is drawn, note: what to say of it}
export async function fromFile(file) {
  const url = await readAsDataUrl(file), extension = /\.(\w+)$/.exec(file.name)?.[1] ?? file.type.split("/")[1];
  const isVideo = file.type.startsWith("video/");
  return { url, extension, kind: isVideo ? "video" : "image", ...await (isVideo ? fromVideo(file) : fromImage(file)) };
}

export async function scene() {
  const response = await fetch(address(SCENE));
  return fromFile(new File([await response.blob()], "scene.png", { type: "image/png" }));
}

async function fromImage(file) {
  let picture;
  try {
    picture = await createImageBitmap(file); // upright, as the server sees it
  } catch {
    throw new Error(`this browser can't read ${file.name || "the file"} as an image`);
  }
  return { frame: async () => picture };
}

// The server may read what this browser can't, and says itself what is wrong with a file.
async function fromVideo(file) {
  const video = document.createElement("video");
  Object.assign(video, { muted: true, preload: "auto" }); // Chromium suspends one with less, and draws nothing of it
  video.src = URL.createObjectURL(file);
  const plays = await happens(video, "onloadeddata");
  const blank = await createImageBitmap(new ImageData(video.videoWidth || 16, video.videoHeight || 9));
  if (!plays) {
    return { note: `this browser can't play ${file.name}: its map is drawn without pictures`, frame: async () => blank };
  }
  const pictures = new Map();
  let last = null; // one after the other: a seek ends the one before it without an event
  const frame = (seconds) => {
    if (!pictures.has(seconds)) {
      last = Promise.resolve(last).then(() => pictureAt(video, seconds, blank));
      pictures.set(seconds, last);
    }
    return pictures.get(seconds);
  };
  return { frame };
}

async function pictureAt(video, seconds, blank) {
  const seeked = happens(video, "onseeked");
  video.currentTime = seconds + 0.001; // `seconds` is rounded: never the frame before it
  if (!await seeked) return blank;
  if (video.readyState < video.HAVE_CURRENT_DATA && !await happens(video, "oncanplay")) return blank;
  const scale = Math.min(1, LONG_SIDE / Math.max(video.videoWidth, video.videoHeight));
  const [resizeWidth, resizeHeight] = [video.videoWidth, video.videoHeight].map((side) => Math.ceil(side * scale));
  return createImageBitmap(video, { resizeWidth, resizeHeight });
}

// Whether it does, and no error.
function happens(video, event) {
  return new Promise((resolve) => {
    video[event] = () => resolve(true);
    video.onerror = () => resolve(false);
    if (video.error) resolve(false);
  });
}

function readAsDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

export const part = (media) =>
  media.kind === "video"
    ? { type: "video_url", video_url: { url: media.url } }
    : { type: "image_url", image_url: { url: media.url } };
