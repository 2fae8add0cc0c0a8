// The slider over the before/after pictures; without scripts they stand side by side.
for (const section of document.querySelectorAll("[data-compare]")) {
  const range = section.querySelector("input[type=range]");
  const buttons = section.querySelectorAll("button[data-mode]");
  const cut = (percent) => {
    range.value = percent;
    section.style.setProperty("--cut", `${percent}%`);
  };
  const mode = (name) => {
    section.classList.toggle("sliding", name === "slider");
    range.disabled = name !== "slider";
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.mode === name));
  };
  section.querySelector(".controls").hidden = false;
  range.addEventListener("input", () => cut(range.value));
  for (const button of buttons) button.addEventListener("click", () => mode(button.dataset.mode));
  section.addEventListener("pointermove", (event) => {
    const pair = event.target.closest(".pair");
    if (!pair || !section.classList.contains("sliding")) return;
    const box = pair.getBoundingClientRect();
    cut(Math.round(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width))));
  });
  mode("slider");
}
