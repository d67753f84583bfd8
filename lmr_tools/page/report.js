"use strict";
// Nothing here writes HTML: names come from files and are set as text.
const all = (root, selector) => [...root.querySelectorAll(selector)];
const element = (name, properties = {}, children = []) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};
const PAGE = 100;

// Empty cells stay at the end, whichever way the rest is sorted.
const compare = (a, b, sign) => {
  if (a === "" || b === "") return (a === "") - (b === "");
  const x = Number(a), y = Number(b);
  const order = Number.isNaN(x) || Number.isNaN(y) ? String(a).localeCompare(String(b), "en", { numeric: true }) : x - y;
  return sign * (order || 0);
};
const nextSort = (heading) => {
  const sort = heading.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sort);
  return sort === "ascending" ? 1 : -1;
};

for (const table of all(document, "table.sortable")) {
  all(table, "thead th").forEach((heading, column) => {
    heading.addEventListener("click", () => {
      const sign = nextSort(heading), body = table.tBodies[0];
      const value = (row) => row.children[column].dataset.value.replace("inf", "Infinity");
      body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), sign)));
    });
  });
}

for (const box of all(document, ".pictures")) {
  const data = JSON.parse(document.getElementById(box.dataset.source).textContent);
  const [metric, filter, failed, count, pager] = [".metric", ".filter", ".failed", ".count", ".pager"].map((s) => box.querySelector(s));
  const [head, body] = [box.querySelector("thead"), box.querySelector("tbody")];
  const state = { column: 0, sign: 1, page: 0 };
  for (const [id, name, , lower] of data.metrics) metric.append(element("option", { value: id, textContent: `${name} ${lower ? "↓" : "↑"}` }));
  if (data.metrics.some(([id]) => id === "psnr_y")) metric.value = "psnr_y";
  const number = (value) => (value === "∞" ? Infinity : value);
  const cell = (value, digits) => (value === null || value === undefined ? "–" : value === "∞" ? "∞" : value.toFixed(digits));
  const columns = ["picture", ...data.runs, ...(data.runs.length > 1 ? ["spread"] : [])];

  const spread = (values) => {
    const there = values.filter((value) => typeof value === "number");
    return there.length > 1 ? Math.max(...there) - Math.min(...there) : "";
  };
  const show = () => {
    const [, , digits, lower] = data.metrics.find(([id]) => id === metric.value) || ["", "", 2, false];
    const values = data.values[metric.value] || [];
    const wanted = filter.value.trim().toLowerCase();
    let rows = data.images.map((name, index) => ({ name, index, values: values.map((run) => run[index]), failures: data.failures[index] }));
    rows = rows.filter((row) => row.name.toLowerCase().includes(wanted) && (!failed.checked || Object.keys(row.failures).length));
    const key = (row) => {
      if (state.column === 0) return row.name;
      const value = state.column <= data.runs.length ? number(row.values[state.column - 1]) : spread(row.values);
      return value === null || value === undefined ? "" : value;
    };
    rows.sort((a, b) => compare(key(a), key(b), state.sign));
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    body.replaceChildren(...rows.slice(state.page * PAGE, (state.page + 1) * PAGE).map((row) => {
      const there = row.values.map(number).filter((value) => typeof value === "number");
      const best = lower ? Math.min(...there) : Math.max(...there);
      const cells = data.runs.map((_, run) => {
        const reason = row.failures[run];
        const top = there.length > 1 && number(row.values[run]) === best;
        const text = reason && typeof row.values[run] !== "number" ? "failed" : cell(row.values[run], digits);
        return element("td", { className: reason ? "none" : top ? "top" : "", title: reason || "" }, [element("span", { textContent: text })]);
      });
      if (data.runs.length > 1) {
        const value = spread(row.values);
        cells.push(element("td", { textContent: value === "" ? "–" : value.toFixed(digits) }));
      }
      return element("tr", {}, [element("th", { scope: "row", className: "name" }, [element("bdi", { textContent: row.name })]), ...cells]);
    }));
    const known = data.total > data.images.length ? `${data.images.length} with the largest spread of ${data.total}` : `${data.total}`;
    count.textContent = `${rows.length} of ${known} pictures`;
    pager.hidden = pages < 2;
    pager.querySelector(".page").textContent = `${state.page + 1} / ${pages}`;
    pager.querySelector(".back").disabled = state.page === 0;
    pager.querySelector(".next").disabled = state.page === pages - 1;
  };
  head.append(element("tr", {}, columns.map((name, column) => {
    const button = element("button", { type: "button", className: "sort", textContent: name });
    const heading = element("th", { scope: "col", className: column ? "" : "name" }, [button]);
    heading.addEventListener("click", () => {
      state.sign = nextSort(heading);
      state.column = column;
      state.page = 0;
      show();
    });
    if (!column) heading.setAttribute("aria-sort", "ascending");
    return heading;
  })));
  for (const control of [metric, filter, failed]) control.addEventListener("input", () => { state.page = 0; show(); });
  const turn = (by) => { state.page += by; show(); box.querySelector(".scroll").scrollTop = 0; };
  pager.querySelector(".back").addEventListener("click", () => turn(-1));
  pager.querySelector(".next").addEventListener("click", () => turn(1));
  show();
}

const zoom = document.getElementById("zoom");
const view = { tiles: [], place: 0, factor: 4 };
const paint = () => {
  const tile = view.tiles[view.place], image = zoom.querySelector("img"), picture = tile.querySelector("img");
  // The LR is shown in the place of the others.
  const side = Math.max(...view.tiles.map((each) => each.querySelector("img").naturalWidth));
  image.src = picture.src;
  image.alt = picture.alt;
  image.style.width = image.style.height = `${side * view.factor}px`;
  zoom.querySelector("strong").textContent = tile.dataset.name;
  zoom.querySelector("small").textContent = tile.parentElement.querySelector("small").textContent;
  zoom.querySelector("output").textContent = `${view.factor}×`;
};
const step = (by) => { view.place = (view.place + by + view.tiles.length) % view.tiles.length; paint(); };
const scale = (by) => { view.factor = Math.min(12, Math.max(1, view.factor + by)); paint(); };
zoom.querySelector(".less").addEventListener("click", () => scale(-1));
zoom.querySelector(".more").addEventListener("click", () => scale(1));
zoom.querySelector(".close").addEventListener("click", () => zoom.close());
zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });
zoom.addEventListener("keydown", (event) => {
  const action = { ArrowRight: () => step(1), ArrowLeft: () => step(-1), "+": () => scale(1), "=": () => scale(1), "-": () => scale(-1) }[event.key];
  if (action) { event.preventDefault(); action(); }
});

for (const figure of all(document, ".figure")) {
  const tiles = all(figure, ".tile");
  tiles.forEach((tile, place) => {
    tile.addEventListener("click", () => {
      view.tiles = tiles;
      view.place = place;
      view.factor = Math.max(1, Math.min(6, Math.floor(Math.min(innerWidth * 0.9, innerHeight * 0.72) / tiles[0].querySelector("img").naturalWidth)));
      paint();
      zoom.showModal();
    });
  });
  const box = figure.querySelector(".compare"), [one, two] = [box.querySelector(".one"), box.querySelector(".two")];
  for (const select of [one, two]) tiles.forEach((tile, place) => select.append(element("option", { value: place, textContent: tile.dataset.name })));
  const pictures = tiles.map((tile) => tile.querySelector("img"));
  const stage = box.querySelector(".stage"), slide = box.querySelector(".slide");
  const fill = () => {
    box.querySelector(".over").src = pictures[one.value].src;
    box.querySelector(".under").src = pictures[two.value].src;
  };
  const move = () => stage.style.setProperty("--cut", `${slide.value}%`);
  // The first method against the last one; with one method, against the target.
  one.value = tiles.length > 3 ? 2 : Math.min(2, tiles.length - 1);
  two.value = tiles.length > 3 ? tiles.length - 1 : 0;
  for (const select of [one, two]) select.addEventListener("input", fill);
  slide.addEventListener("input", move);
  const drag = (event) => {
    const place = stage.getBoundingClientRect();
    slide.value = Math.min(100, Math.max(0, ((event.clientX - place.left) / place.width) * 100));
    move();
  };
  stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); drag(event); });
  stage.addEventListener("pointermove", (event) => { if (stage.hasPointerCapture(event.pointerId)) drag(event); });
  fill();
  box.hidden = false;
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
