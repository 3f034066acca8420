// The image or video that is asked about: from a file, a drop, the clipboard, or the built-in scene.

import { address } from "./api.js";

const SCENE = "playground/scene.png";

// {url: data URL, kind: "image" | "video", frame(index, count): what is drawn, width, height}
export async function fromFile(file) {
  const url = await readAsDataUrl(file);
  return file.type.startsWith("video/") ? fromVideo(file, url) : fromImage(file, url);
}

export async function scene() {
  const response = await fetch(address(SCENE));
  return fromFile(new File([await response.blob()], "scene.png", { type: "image/png" }));
}

async function fromImage(file, url) {
  let picture;
  try {
    picture = await createImageBitmap(file); // upright, as the server sees it
  } catch {
    throw new Error(`this browser can't read ${file.name || "the file"} as an image`);
  }
  return { url, kind: "image", width: picture.width, height: picture.height, frame: async () => picture };
}

async function fromVideo(file, url) {
  const video = document.createElement("video");
  video.muted = true;
  video.src = URL.createObjectURL(file);
  await new Promise((resolve, reject) => {
    video.onloadeddata = resolve;
    video.onerror = () => reject(new Error(`this browser can't play ${file.name || "the file"}`));
  });
  // Which frames are taken the server decides: this is about where they lie.
  const frame = async (index, count) => {
    video.currentTime = video.duration * (index + 0.5) / count;
    await new Promise((resolve) => { video.onseeked = resolve; });
    return createImageBitmap(video);
  };
  return { url, kind: "video", width: video.videoWidth, height: video.videoHeight, frame };
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
