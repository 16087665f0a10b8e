"use strict";
// Visits Omniboard as a person would, in headless Chromium, and prints what it saw of a run as JSON:
// node omniboard_visit.js URL EXPERIMENT SCREENSHOT_FOLDER USER_DATA_FOLDER USER PASSWORD

const path = require("path");
const { chromium } = require(path.join(__dirname, "../tracking/omniboard/node_modules/playwright-core"));

const [url, experiment, screenshots, userData, username, password] = process.argv.slice(2);
const flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
flags.push("--disable-component-update", "--disable-sync");

async function visit(page) {
  const seen = {};
  await page.goto(url);
  const row = page.locator(".fixedDataTableRowLayout_main", { hasText: experiment }).first();
  seen.row = (await row.innerText()).split("\n").map((cell) => cell.trim());
  await row.locator('[test-attr^="cell-row_expander"]').click();

  await page.waitForSelector(".js-plotly-plot .scatterlayer .trace");
  seen.lines = await page.$$eval(".js-plotly-plot .scatterlayer .trace path.js-line", (lines) =>
    lines.map((line) => line.getTotalLength()),
  );
  seen.curves = await page.$eval(".js-plotly-plot", (plot) =>
    Object.fromEntries(plot.data.map((curve) => [curve.name, { x: [...curve.x], y: [...curve.y] }])),
  );
  await page.screenshot({ path: path.join(screenshots, "metrics.png") });

  for (const tab of ["Config", "Artifacts"]) {
    await page.locator("#sidebar").getByText(tab, { exact: true }).click();
    const content = page.locator(".drilldown-view .tab-content");
    await content.getByText(tab === "Config" ? "train_steps" : "final_config.json").first().waitFor();
    seen[tab.toLowerCase()] = await content.innerText();
    await page.screenshot({ path: path.join(screenshots, `${tab.toLowerCase()}.png`) });
  }
  return seen;
}

(async () => {
  const context = await chromium.launchPersistentContext(userData, {
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    headless: true,
    args: flags,
    viewport: { width: 1400, height: 1000 },
    httpCredentials: { username, password },
  });
  try {
    const page = await context.newPage();
    page.setDefaultTimeout(90000);
    console.log(JSON.stringify(await visit(page)));
  } finally {
    await context.close();
  }
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
