"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const say = (text) => { $("#live").textContent = text; };

  // Controls that only work with this script stay hidden without it.
  all(".tools[hidden]").forEach((element) => { element.hidden = false; });
  document.documentElement.classList.add("js");

  // Theme: the system's until the reader chooses; storage may be forbidden (notebook frames).
  const theme = $("#theme");
  const stored = () => { try { return localStorage.getItem("lisa-theme"); } catch { return null; } };
  const isDark = () => (document.documentElement.dataset.theme
    || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  if (stored()) document.documentElement.dataset.theme = stored();
  label();
  theme.setAttribute("aria-label", "Switch between light and dark colours");
  theme.addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try { localStorage.setItem("lisa-theme", next); } catch { /* the choice lasts for this page */ }
    label();
  });

  // Tables: sort by a column, filter the long ones.
  const raw = (cell) => cell.dataset.value ?? cell.textContent;
  const sort = (table, index, numeric) => {
    const heads = all("th", table);
    const head = heads[index];
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = $("tbody", table);
    const key = (row) => {
      const text = raw(row.cells[index]);
      return numeric ? (text === "" ? NaN : Number(text)) : text;
    };
    const compare = (a, b) => {
      if (!numeric) return a.localeCompare(b, "en", { numeric: true });
      return a - b;
    };
    const missing = (value) => numeric && Number.isNaN(value);
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      // What is missing stays at the end, whichever way the rest is sorted.
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      return down ? compare(b, a) : compare(a, b);
    });
    body.append(...rows.map(([, row]) => row));
    say(`Sorted by ${head.textContent.trim()}, ${down ? "descending" : "ascending"}`);
  };
  all("table.sortable").forEach((table) => {
    all("th button", table).forEach((button, index) => {
      const numeric = button.parentElement.classList.contains("n");
      button.addEventListener("click", () => sort(table, index, numeric));
    });
    const rows = [...$("tbody", table).rows];
    if (rows.length <= 12) return;
    const input = document.createElement("input");
    input.type = "search";
    input.className = "filter";
    input.placeholder = "Filter rows";
    input.setAttribute("aria-label", `Filter the rows of: ${table.caption.textContent}`);
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
      say(`${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`);
    });
    table.closest(".scroll").before(input);
  });

  // CSV of the rows as they are shown: sorted and filtered.
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  // A spreadsheet would run a name that begins like a formula.
  const harmless = (text) => (/^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text)) ? `'${text}` : text);
  all("button.csv").forEach((button) => button.addEventListener("click", () => {
    const table = document.getElementById(button.dataset.table);
    const lines = [all("th", table).map((head) => head.textContent.trim())];
    all("tbody tr", table).filter((row) => !row.hidden)
      .forEach((row) => lines.push([...row.cells].map((cell) => raw(cell).trim())));
    const text = lines.map((line) => line.map(harmless).map(quoted).join(",")).join("\r\n") + "\r\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${table.id}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }));

  // Pictures to keep: with the colours and letters that the page gives them, on its paper.
  const standalone = (figure) => {
    const shown = all(".picture svg", figure).find((svg) => svg.checkVisibility?.() ?? true);
    const copy = shown.cloneNode(true);
    const pairs = [[shown, copy], ...all("*", shown).map((element, i) => [element, all("*", copy)[i]])];
    pairs.forEach(([from, to]) => {
      const style = getComputedStyle(from);
      ["fill", "stroke", "color"].forEach((name) => {
        const written = from.getAttribute(name) || from.style.getPropertyValue(name);
        if (/var\(|currentColor/i.test(written)) to.style.setProperty(name, style.getPropertyValue(name));
      });
    });
    all(".here", copy).forEach((element) => element.remove());
    const [, , width, height] = shown.getAttribute("viewBox").split(/[ ,]+/).map(Number);
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    copy.style.background = getComputedStyle(document.body).backgroundColor;
    copy.style.color = getComputedStyle(shown).color;
    copy.style.fontFamily = getComputedStyle(document.body).fontFamily;
    return { text: new XMLSerializer().serializeToString(copy), width, height };
  };
  const keep = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  all("button.save-svg").forEach((button) => button.addEventListener("click", () => {
    const { text } = standalone(document.getElementById(button.dataset.figure));
    keep(new Blob([text], { type: "image/svg+xml" }), `${button.dataset.figure}.svg`);
  }));
  all("button.save-png").forEach((button) => button.addEventListener("click", () => {
    const { text, width, height } = standalone(document.getElementById(button.dataset.figure));
    const image = new Image();
    image.addEventListener("load", () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [width * 3, height * 3];
      const drawing = canvas.getContext("2d");
      drawing.fillStyle = getComputedStyle(document.body).backgroundColor;
      drawing.fillRect(0, 0, canvas.width, canvas.height);
      drawing.drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => keep(blob, `${button.dataset.figure}.png`), "image/png");
    });
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  }));

  // Values: of the mark next to the pointer, or of the one that the arrow keys have come to.
  const tip = $("#tip");
  const hide = () => { tip.hidden = true; all(".here").forEach((mark) => mark.remove()); };
  const show = (picture, x, y, text) => {
    const svg = $("svg", picture);
    all(".here").forEach((mark) => mark.remove());
    const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    ring.setAttribute("class", "here");
    [["cx", x], ["cy", y], ["r", 5]].forEach(([name, value]) => ring.setAttribute(name, value));
    svg.append(ring);
    const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(at.x - box.width / 2, 4), innerWidth - box.width - 4);
    const over = at.y - box.height - 14;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(over > 4 ? over : at.y + 14) + scrollY}px`;
  };
  const value = (v) => (v === null ? "not measured" : String(v).replace("-", "\u2212"));
  all(".picture[data-readout]").forEach((picture) => {
    let data;
    const read = () => { data ??= JSON.parse(picture.dataset.readout); return data; };
    const between = ([a, b], i, n) => (n < 2 ? a : a + ((b - a) * i) / (n - 1));
    const nearest = ([a, b], p, n) => (n < 2 || a === b ? 0
      : Math.min(n - 1, Math.max(0, Math.round(((p - a) / (b - a)) * (n - 1)))));
    const tell = (place) => {
      const { p, x, y, r, c, v } = read();
      if (p) {
        const [px, py, text] = p[place];
        show(picture, px, py, text);
        return text;
      }
      const [row, column] = place;
      const text = `${r[row]}, ${c[column]}: ${value(v[row][column])}`;
      show(picture, between(x, column, c.length), between(y, row, r.length), text);
      return text;
    };
    picture.addEventListener("pointermove", (event) => {
      const svg = $("svg", picture);
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const { p, x, y, r, c } = read();
      if (!p) { tell([nearest(y, at.y, r.length), nearest(x, at.x, c.length)]); return; }
      if (!p.length) return;
      let best = 0;
      let least = Infinity;
      p.forEach(([px, py], i) => {
        const distance = (px - at.x) ** 2 + (py - at.y) ** 2;
        if (distance < least) { least = distance; best = i; }
      });
      tell(best);
    });
    picture.addEventListener("pointerleave", hide);
    let place = null;
    picture.addEventListener("blur", hide);
    picture.addEventListener("focus", () => {
      if (!picture.matches(":focus-visible")) return;
      const { p } = read();
      if (p && !p.length) return;
      place ??= p ? 0 : [0, 0];
      tell(place);
    });
    picture.addEventListener("keydown", (event) => {
      const { p, y, r, c } = read();
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0;
      // Rows count from the bottom of most pictures, from the top of some.
      const up = { ArrowUp: 1, ArrowDown: -1 }[event.key] ?? 0;
      const end = { Home: 0, End: 1 }[event.key];
      if (event.key === "Escape") { hide(); return; }
      if (!step && !(up && !p) && end === undefined) return;
      event.preventDefault();
      const within = (i, n) => Math.min(n - 1, Math.max(0, i));
      if (p) {
        if (!p.length) return;
        place = within(end === undefined ? (place ?? 0) + step : end * (p.length - 1), p.length);
      } else {
        const [row, column] = place ?? [0, 0];
        const rise = y[1] < y[0] ? up : -up;
        place = [within(row + rise, r.length),
          within(end === undefined ? column + step : end * (c.length - 1), c.length)];
      }
      say(tell(place));
    });
  });

  // One layer, everywhere: pointer and focus show it for a moment, the menu keeps it.
  const menu = $("#layer");
  const highlight = (layer) => {
    all("[data-layer].on").forEach((element) => element.classList.remove("on"));
    if (layer) all(`[data-layer="${layer}"]`).forEach((element) => element.classList.add("on"));
  };
  menu.addEventListener("change", () => {
    highlight(menu.value);
    say(menu.value ? `Layer ${menu.value} is highlighted` : "No layer is highlighted");
  });
  document.addEventListener("pointerover", (event) => {
    const marked = event.target.closest?.("[data-layer]");
    highlight(marked ? marked.dataset.layer : menu.value);
  });
  document.addEventListener("click", (event) => {
    const marked = event.target.closest?.("[data-layer]");
    if (!marked) return;
    menu.value = menu.value === marked.dataset.layer ? "" : marked.dataset.layer;
    highlight(menu.value);
  });

  addEventListener("beforeprint", hide);
})();
