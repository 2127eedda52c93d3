// Uses docs/elsewhere/index.html as a person does; started by test_elsewhere.py from a copy of that folder.
//
//   node elsewhere.mjs CHROMIUM URL FOLDER FILES...
//
// Chooses the files, clicks the first photograph, saves the embeddings into FOLDER and prints what the page showed.
// Without files it prints what the page says when it has started.

import puppeteer from "puppeteer-core";

const [chromium, url, folder, ...files] = process.argv.slice(2);
const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage();
  const [requests, problems] = [[], []];
  page.on("request", (request) => requests.push(`${request.method()} ${request.url()}`));
  page.on("pageerror", (error) => problems.push(error.message));
  await page.goto(url);
  await page.waitForFunction(started);
  const shown = { problems, requests, wrong: await texts(page, "#wrong p") };
  if (files.length) Object.assign(shown, await use(page));
  console.log(JSON.stringify(shown));
} finally {
  await browser.close();
}

async function use(page) {
  const session = await browser.target().createCDPSession();
  await session.send("Browser.setDownloadBehavior", { behavior: "allow", downloadPath: folder, eventsEnabled: true });
  const begin = performance.now();
  await (await page.$("#files")).uploadFile(...files);
  await page.waitForFunction(() => document.querySelector("#progress").hidden, { timeout: 120_000 });
  const seconds = (performance.now() - begin) / 1000;
  await page.click("#list button");
  const order = await texts(page, "#list .name");
  const cosines = await texts(page, "#list .cosine");
  const saved = new Promise((resolve) =>
    session.on("Browser.downloadProgress", ({ state }) => state === "completed" && resolve()),
  );
  await page.click("#json");
  await saved;
  return { seconds, order, cosines, wrong: await texts(page, "#wrong p") };
}

function texts(page, selector) {
  return page.$$eval(selector, (found) => found.map((one) => one.textContent));
}

function started() {
  return document.querySelector("#status").textContent === "Ready" || document.querySelector("#wrong p") !== null;
}
