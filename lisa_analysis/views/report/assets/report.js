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

  // Paper has no clicks: everything is open while printing, but for tables of many pages.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open]):not(.long)");
    opened.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));
})();
