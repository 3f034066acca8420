// A picture with its token map over it, drawn on a canvas.

const LONG_SIDE = 960;
const GOLDEN = 0.618034;
const REST = 0.3; // share of a grid from which a group is grey: it would hide the others

// The grids that are drawn together: `parts` of a map, each a name and its grids, and of a video when it is shown.
export function parts(map) {
  const { grids, seconds } = map.items[0];
  if (seconds) return grids.map((grid, i) => ({ name: grid.name, grids: [grid], seconds: seconds[i] }));
  const tiles = grids.filter(({ name }) => /^(tile|mosaic)/.test(name));
  const others = grids.filter((grid) => !tiles.includes(grid)).map((grid) => ({ name: grid.name || "image", grids: [grid] }));
  return tiles.length ? [...others, { name: tiles.length > 1 ? "tiles" : tiles[0].name, grids: tiles }] : others;
}

export function draw(canvas, picture, grids, lit = null, longSide = LONG_SIDE) {
  const scale = longSide / Math.max(picture.width, picture.height);
  canvas.width = Math.round(picture.width * scale);
  canvas.height = Math.round(picture.height * scale);
  const pen = canvas.getContext("2d");
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (!grids) return;
  pen.fillStyle = "rgb(12 12 14 / 78%)";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  for (const grid of grids) drawGrid(pen, picture, cells(grid, canvas), lit?.grid === grid ? lit.group : null);
}

function cells(grid, { width, height }) {
  const [left, top, right, bottom] = grid.box;
  const x = Array.from({ length: grid.columns + 1 }, (_, i) => Math.round((left + (right - left) * i / grid.columns) * width));
  const y = Array.from({ length: grid.rows + 1 }, (_, i) => Math.round((top + (bottom - top) * i / grid.rows) * height));
  return { grid, x, y };
}

function drawGrid(pen, picture, { grid, x, y }, lit) {
  const { width, height } = pen.canvas, colours = coloursOf(grid);
  const neighbour = (row, column) =>
    row < 0 || column < 0 || row >= grid.rows || column >= grid.columns ? null : grid.group[row * grid.columns + column];
  const band = Math.max(2, Math.round((x.at(-1) - x[0]) / grid.columns / 12));
  each(grid, (row, column, group) => {
    if (group < 0) return;
    const left = Math.max(0, x[column]), top = Math.max(0, y[row]);
    const w = Math.min(width, x[column + 1]) - left, h = Math.min(height, y[row + 1]) - top;
    if (w <= 0 || h <= 0) return;
    const sx = picture.width / width, sy = picture.height / height;
    pen.drawImage(picture, left * sx, top * sy, w * sx, h * sy, left, top, w, h);
    const colour = colours.get(group);
    if (colour) {
      pen.fillStyle = `hsl(${colour} / ${group === lit ? 65 : 28}%)`;
      pen.fillRect(left, top, w, h);
    }
    pen.fillStyle = group === lit ? "#fff" : colour ? `hsl(${colour})` : "#fff";
    if (neighbour(row, column - 1) !== group) pen.fillRect(left, top, band, h);
    if (neighbour(row, column + 1) !== group) pen.fillRect(left + w - band, top, band, h);
    if (neighbour(row - 1, column) !== group) pen.fillRect(left, top, w, band);
    if (neighbour(row + 1, column) !== group) pen.fillRect(left, top + h - band, w, band);
  });
  pen.fillStyle = "#000";
  each(grid, (row, column, group) => {
    const right = neighbour(row, column + 1), below = neighbour(row + 1, column);
    if (right !== null && right !== group) pen.fillRect(x[column + 1] - 1, y[row], 2, y[row + 1] - y[row]);
    if (below !== null && below !== group) pen.fillRect(x[column], y[row + 1] - 1, x[column + 1] - x[column], 2);
  });
}

function each(grid, visit) {
  grid.group.forEach((group, token) => visit(Math.floor(token / grid.columns), token % grid.columns, group));
}

// Of merged groups: hues that differ most between those that begin one after the other.
function coloursOf(grid) {
  const colours = new Map();
  for (const group of grid.group) {
    if (group < 0 || grid.sizes[group] < 2 || colours.has(group)) continue;
    const isRest = grid.sizes[group] > REST * grid.group.length;
    colours.set(group, isRest ? "220 6% 46%" : `${Math.round(360 * ((colours.size * GOLDEN) % 1))} 100% 55%`);
  }
  return colours;
}

// The token at shares (x, y) of the picture; of several grids the last, which is drawn on top.
export function tokenAt(grids, x, y) {
  for (const grid of [...grids].reverse()) {
    const [left, top, right, bottom] = grid.box;
    const column = Math.floor((x - left) / (right - left) * grid.columns);
    const row = Math.floor((y - top) / (bottom - top) * grid.rows);
    if (column >= 0 && row >= 0 && column < grid.columns && row < grid.rows) {
      return { grid, row, column, group: grid.group[row * grid.columns + column] };
    }
  }
  return null;
}

export const first = ([grid]) => ({ grid, row: 0, column: 0, group: grid.group[0] });

// The token that lies `down` and `across` from another, in its grid or the next; null beyond the edge.
export function beside(grids, { grid, row, column }, [down, across]) {
  const [left, top, right, bottom] = grid.box;
  const x = left + (right - left) * (column + across + 0.5) / grid.columns;
  const y = top + (bottom - top) * (row + down + 0.5) / grid.rows;
  return tokenAt(grids, x, y);
}

// Of several grids together.
export function counts(grids) {
  const sum = (read) => grids.reduce((total, grid) => total + read(grid), 0);
  return { encoded: sum(({ group }) => group.length), kept: sum(({ sizes }) => sizes.length) };
}

export function describe(token) {
  if (!token) return "the vision tower does not see this part";
  const { grid, row, column, group } = token;
  const where = `${grid.name ? `${grid.name}, ` : ""}row ${row + 1}, column ${column + 1}`;
  if (group < 0) return `${where}: dropped`;
  const size = grid.sizes[group];
  return size === 1 ? `${where}: a token of its own` : `${where}: one of ${size} tokens that become one`;
}
