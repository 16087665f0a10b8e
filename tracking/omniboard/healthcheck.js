"use strict";
// Exits with 0 when Omniboard answers and reaches its MongoDB.

const { PORT = "9000", OMNIBOARD_USER, OMNIBOARD_PASSWORD } = process.env;
const headers = {};
if (OMNIBOARD_USER) {
  headers.Authorization = `Basic ${Buffer.from(`${OMNIBOARD_USER}:${OMNIBOARD_PASSWORD}`).toString("base64")}`;
}
fetch(`http://127.0.0.1:${PORT}/sacred/api/v1/Runs/count`, { headers, signal: AbortSignal.timeout(8000) })
  .then((answer) => process.exit(answer.ok ? 0 : 1))
  .catch(() => process.exit(1));
