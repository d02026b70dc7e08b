"use strict";
// Draws the figures of #figures, resolving colour tokens against the style sheet, again whenever the theme changes.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = () => window.innerWidth < 560;

  function resolver() {
    const style = getComputedStyle(document.documentElement);
    const variable = (name) => style.getPropertyValue(name).trim();
    const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    const stops = ["--heat-0", "--heat-1", "--heat-2"].map((name) => rgb(variable(name)));
    const heat = (t) => {
      const [from, to, part] = t < 0.5 ? [stops[0], stops[1], 2 * t] : [stops[1], stops[2], 2 * t - 1];
      return `rgb(${from.map((c, i) => Math.round(c + (to[i] - c) * part)).join(",")})`;
    };
    const resolve = (value) => {
      if (typeof value === "string") {
        if (/^var\(--[\w-]+\)$/.test(value)) return variable(value.slice(4, -1));
        if (/^heat\([\d.]+\)$/.test(value)) return heat(parseFloat(value.slice(5)));
        return value;
      }
      if (Array.isArray(value)) return value.map(resolve);
      if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v)]));
      return value;
    };
    return resolve;
  }

  function draw(element) {
    const name = element.dataset.chart;
    const chosen = document.querySelector(`input[name="view-${name}"]:checked`);
    const view = chosen ? chosen.value : Object.keys(figures[name])[0];
    const figure = resolver()(figures[name][view]);
    element.style.minHeight = figure.layout.height ? "0" : "";
    if (narrow()) {
      figure.layout.margin = { ...figure.layout.margin, l: 48, r: 6 };
      figure.layout.font.size = 11;
    }
    const config = { responsive: true, displayModeBar: !narrow(), displaylogo: false,
                     modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    Plotly.react(element, figure.data, figure.layout, config);
  }

  const charts = [...document.querySelectorAll("[data-chart]")].filter((e) => Object.keys(figures[e.dataset.chart] || {}).length);
  const drawAll = () => charts.forEach(draw);
  document.querySelectorAll("fieldset input").forEach((input) =>
    input.addEventListener("change", () => charts.filter((e) => `view-${e.dataset.chart}` === input.name).forEach(draw)));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
