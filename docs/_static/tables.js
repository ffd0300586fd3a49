// On a phone, site.css shows each row of a table of three or more columns as a list: cells need the names of their columns.
for (const table of document.querySelectorAll("table.docutils")) {
  const names = [...table.querySelectorAll("thead th")].map((header) => header.textContent);
  if (names.length < 3) continue;
  table.classList.add("wide");
  for (const row of table.querySelectorAll("tbody tr")) {
    [...row.cells].forEach((cell, column) => names[column] && (cell.dataset.column = names[column]));
  }
}

// Browsers break a line after each hyphen, and so inside "--option". Here options and names stay whole, paths are broken
// after "/", and what is too long for a phone after "." or "_".
const MOST_CHARACTERS = 25;
function parts(word) {
  const folders = word.length > 16 ? word.split(/(?<=\w{2}[/,[(|])/) : [word];
  return folders.flatMap((part) => (part.length > MOST_CHARACTERS ? part.split(/(?<=[._])/) : [part]));
}
for (const code of document.querySelectorAll("code.literal, .highlight-bash pre")) {
  const texts = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) found.push(texts.currentNode);
  for (const text of found) {
    const pieces = text.data.split(/(\s+)/).flatMap((word) => {
      if (!word.trim()) return [word];
      return parts(word).flatMap((part, index) => {
        const whole = document.createElement("span");
        whole.className = "whole";
        whole.textContent = part;
        return index ? [document.createElement("wbr"), whole] : [whole];
      });
    });
    text.replaceWith(...pieces);
  }
}
