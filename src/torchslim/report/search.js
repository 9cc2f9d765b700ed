(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { margin, plain, color, axis, layout, draw, keep } = plots;
  const element = document.getElementById("front-plot");
  if (!element) return;
  const chosen = { x: data.x, y: data.y };
  const title = (name) => data.axes.find((each) => each.name === name).title;
  const has = (point) => chosen.x in point.figures && chosen.y in point.figures;
  const hover = (point) => `<b>${plain(point.label)}</b><br>${point.lines.map(plain).join("<br>")}`;

  function dots(points, marker, extra) {
    return {
      type: "scatter", mode: "markers", cliponaxis: false, hoverinfo: "text", hovertext: points.map(hover),
      x: points.map((p) => p.figures[chosen.x]), y: points.map((p) => p.figures[chosen.y]), marker, ...extra,
    };
  }

  // of two axes out of several, only those that no other beats in both can be joined
  function joined(points) {
    const sorted = [...points].sort((a, b) => a.figures[chosen.x] - b.figures[chosen.x] || a.figures[chosen.y] - b.figures[chosen.y]);
    let least = Infinity;
    return sorted.filter((p) => p.figures[chosen.y] < least && ((least = p.figures[chosen.y]), true));
  }

  function bounds() {
    const line = { color: color("warn"), width: 1, dash: "dash" };
    const shapes = [];
    if (chosen.x in data.bounds) shapes.push({ type: "line", x0: data.bounds[chosen.x], x1: data.bounds[chosen.x], yref: "paper", y0: 0, y1: 1, line });
    if (chosen.y in data.bounds) shapes.push({ type: "line", y0: data.bounds[chosen.y], y1: data.bounds[chosen.y], xref: "paper", x0: 0, x1: 1, line });
    return shapes;
  }

  // a bound far from all points is left outside: it would press them into a corner
  function range(name, points) {
    const values = points.flatMap((p) => [p.figures[name], p.low?.[name], p.high?.[name]]).filter((v) => v !== undefined);
    if (!values.length) return [0, 1];
    let low = Math.min(...values), high = Math.max(...values);
    const span = high - low || Math.abs(high) || 1, bound = data.bounds[name];
    if (bound !== undefined && bound > low - span && bound < high + span) [low, high] = [Math.min(low, bound), Math.max(high, bound)];
    const pad = (high - low || span) * 0.08;
    return [low - pad, high + pad];
  }

  function all() {
    const trials = data.trials.filter(has), front = data.front.filter(has), original = [data.original].filter(has);
    const line = joined(front);
    const measured = dots(front, {
      size: 12, symbol: "diamond", line: { color: color("raised"), width: 1.5 },
      color: front.map((p) => color(p.within ? "accent" : "bad")),
    }, { name: "front" });
    if (front.length && front.every((p) => chosen.x in p.low)) {
      measured.error_x = {
        type: "data", symmetric: false, color: color("muted"), thickness: 1, width: 4,
        array: front.map((p) => p.high[chosen.x] - p.figures[chosen.x]),
        arrayminus: front.map((p) => p.figures[chosen.x] - p.low[chosen.x]),
      };
    }
    const shown = [...trials, ...front, ...original];
    draw(element, [
      dots(trials, { size: 8, color: color("muted"), opacity: 0.35 }, { name: "trials" }),
      {
        type: "scatter", mode: "lines", hoverinfo: "skip", name: "joined", line: { color: color("accent"), width: 1.5 },
        x: line.map((p) => p.figures[chosen.x]), y: line.map((p) => p.figures[chosen.y]),
      },
      dots(original, { size: 10, color: color("line-2"), symbol: "square" }, { name: "original" }),
      measured,
    ], layout({
      margin: { ...margin, l: 66 }, shapes: bounds(), hovermode: "closest",
      xaxis: axis(title(chosen.x), { nticks: 8, range: range(chosen.x, shown) }),
      yaxis: axis(title(chosen.y), { nticks: 8, range: range(chosen.y, shown) }),
    }));
  }

  for (const which of ["x", "y"]) {
    const select = document.getElementById(`axis-${which}`);
    select.value = chosen[which];
    select.addEventListener("change", () => { chosen[which] = select.value; all(); });
  }
  keep(all);
})();
