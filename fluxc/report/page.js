// The slider: two images of one prompt over each other, from the images that the page already shows.
(() => {
  const box = document.getElementById("compare");
  const rows = [...document.querySelectorAll("[data-prompt]")];
  if (!box || !rows.length) return;
  const [prompt, left, right] = ["prompt", "left", "right"].map((name) => document.getElementById("compare-" + name));
  const range = document.getElementById("compare-range");
  const stage = box.querySelector(".stage");
  const [under, over] = stage.querySelectorAll("img");
  const images = (row) => [...row.querySelectorAll("img")];
  const option = (text) => Object.assign(document.createElement("option"), { textContent: text });
  prompt.append(...rows.map((row) => option(row.dataset.prompt)));
  for (const choice of [left, right]) choice.append(...images(rows[0]).map((image) => option(image.dataset.title)));
  right.selectedIndex = Math.min(1, right.length - 1);
  const show = () => {
    const found = images(rows[prompt.selectedIndex]);
    for (const [target, choice] of [[under, left], [over, right]]) {
      const source = found[choice.selectedIndex];
      target.src = source.src;
      target.alt = source.alt;
    }
  };
  const cut = () => {
    stage.style.setProperty("--cut", range.value + "%");
    range.setAttribute("aria-valuetext", range.value + " % " + left.value + ", the rest " + right.value);
  };
  for (const choice of [prompt, left, right]) choice.addEventListener("change", () => { show(); cut(); });
  range.addEventListener("input", cut);
  show();
  cut();
  box.hidden = false;
})();
