// On a phone, site.css shows each row of a table of three or more columns as a list: cells need the names of their columns.
for (const table of document.querySelectorAll("table.docutils")) {
  const names = [...table.querySelectorAll("thead th")].map((header) => header.textContent);
  if (names.length < 3) continue;
  table.classList.add("wide");
  for (const row of table.querySelectorAll("tbody tr")) {
    [...row.cells].forEach((cell, column) => (cell.dataset.column = names[column]));
  }
}
