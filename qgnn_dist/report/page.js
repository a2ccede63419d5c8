"use strict";
// Tells values under the pointer: of charts from the page's JSON, of cells and bars from their data-tip.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = new Map(data.charts.map((chart) => [chart.id, chart]));
  const tip = document.getElementById("tip");

  const bytes = (value) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let at = 0;
    while (value >= 1024 && at < 4) { value /= 1024; at += 1; }
    return `${value.toFixed(at ? 1 : 0)} ${units[at]}`;
  };
  const said = (value, unit) => {
    if (value === null) return "–";
    if (unit === "share") return `${(100 * value).toFixed(2)} %`;
    if (unit === "seconds") return value < 1 ? `${(1000 * value).toPrecision(4)} ms` : `${value.toPrecision(4)} s`;
    if (unit === "bytes") return bytes(value);
    return Number(value.toPrecision(5)).toString();
  };
  const show = (text, event) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(event.clientX + 14, innerWidth - box.width - 6))}px`;
    tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18}px`;
  };
  const hide = () => {
    tip.hidden = true;
    for (const line of document.querySelectorAll("svg .cursor")) line.style.visibility = "hidden";
  };
  const nearest = (values, x) => values.reduce((best, value) => Math.abs(value - x) < Math.abs(best - x) ? value : best, values[0]);

  const point = (svg, event) => {
    const chart = charts.get(svg.dataset.chart);
    const [first, last, left, right] = svg.dataset.x.split(" ").map(Number);
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const series = chart.series.filter((one) => one.source);
    const x = nearest(series.flatMap((one) => one.x), first + (last - first) * (at - left) / (right - left));
    const words = series.map((one) => [one.name, one.y[one.x.indexOf(x)]]).filter(([, y]) => y !== undefined);
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("transform", `translate(${left + (right - left) * (x - first) / (last - first)} 0)`);
    cursor.style.visibility = "visible";
    show([`${chart.x_name} ${Number(x.toPrecision(4))}`, ...words.map(([name, y]) => `${name}: ${said(y, chart.unit)}`)].join("\n"), event);
  };
  const look = (event) => {
    hide();
    const marked = event.target.closest("[data-tip]");
    const chart = event.target.closest("svg[data-chart]");
    if (marked) show(marked.dataset.tip, event);
    else if (chart) point(chart, event);
  };
  document.addEventListener("pointermove", look);
  document.addEventListener("pointerdown", look);
  document.addEventListener("pointerleave", hide);
  document.addEventListener("scroll", hide, { passive: true });
})();
