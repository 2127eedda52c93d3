// Embeddings from an exported file in Node.js.
//
//   npm install
//   node embed.mjs model_with_preprocess.onnx a.jpg b.jpg
//
// Prints a JSON object a line: {"image": ..., "embedding": [...]}, of unit length.

import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-web";
import sharp from "sharp";

const [model, ...files] = process.argv.slice(2);
const session = await ort.InferenceSession.create(await readFile(model));

for (const file of files) {
  const { data, width, height } = await readPixels(file);
  const images = new ort.Tensor("uint8", data, [1, height, width, 3]);
  const { embedding } = await session.run({ images });
  const length = Math.hypot(...embedding.data);
  console.log(JSON.stringify({ image: file, embedding: Array.from(embedding.data, (number) => number / length) }));
}

// RGB, upright by EXIF, transparency on white; colour profiles are left alone, as in training.
async function readPixels(file) {
  const { data, info } = await sharp(file, { ignoreIcc: true })
    .autoOrient()
    .flatten({ background: "white" })
    .toColourspace("srgb")
    .raw()
    .toBuffer({ resolveWithObject: true });
  return { data, width: info.width, height: info.height };
}
