// Runs the exported file, away from the page's own thread so that the page stays quick.
//
// Takes {model: URL} first and answers {ready: true} or {error}; then takes one {file} after the other and answers
// {embedding, thumbnail, seconds} or {error}.

const RUNTIME = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
const MAX_PIXELS = 89_478_485; // as in micl-zoo
const STRIP_PIXELS = 4_000_000; // read from the canvas at a time: phones have no canvas for a whole photograph
const THUMBNAIL = 480;
let ort, session;

self.onmessage = async ({ data }) => {
  try {
    self.postMessage(data.model ? await open(data.model) : await embed(data.file));
  } catch (error) {
    self.postMessage({ error: error.message ?? String(error) });
  }
};

async function open(model) {
  checkCanvas();
  try {
    ort = await import(RUNTIME);
  } catch {
    throw new Error(`onnxruntime-web is not here: run npm install in the folder of this page (${RUNTIME} is missing)`);
  }
  const answer = await fetch(model).catch((error) => ({ status: error.message }));
  if (!answer.ok) {
    const way = "make it with micl-zoo export vit_ti16.tin200 -o . --with-preprocess";
    throw new Error(`no model at ${model} (${answer.status}): ${way}`);
  }
  const bytes = await answer.arrayBuffer();
  session = await ort.InferenceSession.create(bytes).catch((error) => {
    throw new Error(`${model} is no ONNX file that can be run here: ${error.message}`);
  });
  const { inputNames, outputNames } = session;
  if (inputNames[0] !== "images" || !outputNames.includes("embedding")) {
    throw new Error(`${model} takes ${inputNames} and gives ${outputNames}: export it --with-preprocess`);
  }
  return { ready: true };
}

async function embed(file) {
  const begin = performance.now();
  // Upright by EXIF is the default; the numbers in the file are wanted, not the colours of this screen.
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).catch(() => {
    throw new Error("not an image, or of a format that this browser does not read");
  });
  try {
    const images = new ort.Tensor("uint8", readPixels(bitmap), [1, bitmap.height, bitmap.width, 3]);
    const { embedding } = await session.run({ images }, ["embedding"]);
    const length = Math.hypot(...embedding.data);
    const row = embedding.data.map((number) => number / length);
    return { embedding: row, thumbnail: await thumbnail(bitmap), seconds: (performance.now() - begin) / 1000 };
  } finally {
    bitmap.close();
  }
}

// RGB, transparency on white, as (height, width, 3).
function readPixels(bitmap) {
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    throw new Error(`${width} x ${height} pixels, the limit is ${MAX_PIXELS.toLocaleString("en")} in all`);
  }
  const rgb = new Uint8Array(width * height * 3);
  const rows = Math.min(height, Math.ceil(STRIP_PIXELS / width));
  const context = canvas(width, rows, { willReadFrequently: true });
  for (let top = 0, to = 0; top < height; top += rows) {
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, -top);
    const rgba = context.getImageData(0, 0, width, Math.min(rows, height - top)).data;
    for (let from = 0; from < rgba.length; from += 4) {
      rgb[to++] = rgba[from];
      rgb[to++] = rgba[from + 1];
      rgb[to++] = rgba[from + 2];
    }
  }
  return rgb;
}

// The middle square.
function thumbnail(bitmap) {
  const side = Math.min(bitmap.width, bitmap.height);
  const context = canvas(THUMBNAIL, THUMBNAIL);
  context.imageSmoothingQuality = "high";
  const [left, top] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
  context.drawImage(bitmap, left, top, side, side, 0, 0, THUMBNAIL, THUMBNAIL);
  return context.canvas.convertToBlob({ type: "image/jpeg", quality: 0.85 });
}

function canvas(width, height, options) {
  const context = new OffscreenCanvas(width, height).getContext("2d", options);
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  return context;
}

// Some browsers, when told to resist tracking, change what is read from a canvas; the embeddings would be wrong.
function checkCanvas() {
  const context = canvas(16, 16, { willReadFrequently: true });
  const written = context.createImageData(16, 16);
  written.data.forEach((_, place) => (written.data[place] = place % 4 === 3 ? 255 : (place * 7) % 256));
  context.putImageData(written, 0, 0);
  const read = context.getImageData(0, 0, 16, 16).data;
  if (written.data.some((value, place) => value !== read[place])) {
    throw new Error("this browser changes pixels that a page reads, against tracking: allow canvas for this page");
  }
}
