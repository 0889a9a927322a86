"use strict";
const table = document.getElementById("rows");
if (table) {
  const box = document.getElementById("search"), count = document.getElementById("count"), body = table.tBodies[0];
  const rows = [...body.rows].map(row => ({row, text: row.textContent.toLowerCase()}));
  const search = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const {row, text} of rows) {
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };
  box.addEventListener("input", search);
  [...table.tHead.rows[0].cells].forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.ariaSort === "ascending", value = entry => entry.row.cells[column].textContent;
    for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
    head.ariaSort = down ? "descending" : "ascending";
    const compare = new Intl.Collator("en", {numeric: true}).compare;
    const number = text => text.trim() === "" ? NaN : Number(text);
    rows.sort((a, b) => {
      const x = number(value(a)), y = number(value(b));
      const order = Number.isNaN(x) || Number.isNaN(y) ? compare(value(a), value(b)) : x - y;
      return down ? -order : order;
    });
    body.append(...rows.map(entry => entry.row));
  }));
  const asked = new URLSearchParams(location.hash.slice(1)).get("q");
  if (asked) {
    box.value = asked;
    box.scrollIntoView();
  }
  search();
}
