"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { margin, plain, color, axis, layout, draw, keep } = plots;

  const overlap = (a, b) =>
    Math.max(0, Math.min(a.x1, b.x1) - Math.max(a.x0, b.x0)) * Math.max(0, Math.min(a.y1, b.y1) - Math.max(a.y0, b.y0));

  // Points often coincide (a step that gained nothing, the artifact on its last step): each label takes the nearest
  // free place around its point, so that all can be read.
  function placed(points, toX, toY, width, height) {
    const marks = points.map((p) => ({ x0: toX(p.x) - 7, x1: toX(p.x) + 7, y0: toY(p.y) - 7, y1: toY(p.y) + 7 }));
    const bars = points.filter((p) => "low" in p)
      .map((p) => ({ x0: toX(p.low), x1: toX(p.high), y0: toY(p.y) - 2, y1: toY(p.y) + 2 }));
    const taken = [];
    const angles = [270, 90, 315, 225, 45, 135, 0, 180, 292, 248, 68, 112, 340, 200, 20, 160];
    return points.map((point) => {
      const half = point.label.length * 3.4 + 4;
      let best = null;
      for (const reach of [17, 32, 48, 64, 82, 102]) {
        for (const angle of angles) {
          const turn = (angle * Math.PI) / 180;
          const dx = Math.cos(turn) * (reach + half * Math.abs(Math.cos(turn)));
          const dy = Math.sin(turn) * reach;
          const x = toX(point.x) + dx, y = toY(point.y) + dy;
          const box = { x0: x - half, x1: x + half, y0: y - 8, y1: y + 8 };
          const area = (box.x1 - box.x0) * (box.y1 - box.y0);
          const inside = overlap(box, { x0: 0, x1: width, y0: 0, y1: height });
          const cost = (area - inside) * 4 + reach / 50 +
            [...taken, ...marks, ...bars].reduce((sum, other) => sum + overlap(box, other), 0);
          if (best === null || cost < best.cost) best = { cost, box, dx, dy, reach };
        }
      }
      taken.push(best.box);
      return {
        x: point.x, y: point.y, ax: best.dx, ay: best.dy, axref: "pixel", ayref: "pixel", text: plain(point.label),
        xanchor: "center", yanchor: "middle", showarrow: true, arrowhead: 0, arrowwidth: 1, standoff: 6,
        arrowcolor: best.reach > 17 ? color("muted") : "rgba(0,0,0,0)", borderpad: 1,
        font: { size: 12, color: point.kind === "artifact" ? color("accent") : color("ink") },
      };
    });
  }

  function tradeoff(plot) {
    const element = document.getElementById(plot.id), points = plot.points;
    const width = element.clientWidth - margin.l - margin.r, height = element.clientHeight - margin.t - margin.b;
    const right = Math.max(...points.map((p) => p.high ?? p.x)) * 1.12 || 1;
    const values = points.map((p) => p.y), low = Math.min(...values), high = Math.max(...values);
    const pad = (high - low) * 0.3 || Math.abs(high) * 0.05 || 1;
    const range = [low - pad, high + pad];
    const toX = (x) => (x / right) * width, toY = (y) => ((range[1] - y) / (range[1] - range[0])) * height;
    const shade = (p) => color(p.kind === "artifact" ? "accent" : p.kind === "baseline" ? "muted" : "line-2");
    const path = {
      type: "scatter", mode: "lines", x: points.map((p) => p.x), y: values, hoverinfo: "skip",
      line: { color: color("rule"), width: 1.5 },
    };
    const dots = {
      type: "scatter", mode: "markers", x: points.map((p) => p.x), y: values, cliponaxis: false,
      marker: {
        size: 11, color: points.map(shade), line: { color: color("raised"), width: 1.5 },
        symbol: points.map((p) => (p.kind === "artifact" ? "diamond" : "circle")),
      },
      hovertext: points.map((p) => `<b>${plain(p.label)}</b><br>${plain(p.metric)}<br>${plain(p.text)}`),
      hoverinfo: "text",
    };
    if (points.some((p) => "low" in p)) {
      dots.error_x = {
        type: "data", symmetric: false, array: points.map((p) => p.high - p.x), arrayminus: points.map((p) => p.x - p.low),
        color: color("muted"), thickness: 1, width: 4,
      };
    }
    draw(element, [path, dots], layout({
      xaxis: axis(plot.x, { range: [0, right] }), yaxis: axis(plot.y, { range }),
      annotations: placed(points, toX, toY, width, height),
    }));
  }

  function history(plot) {
    const epochs = plot.where.map((_, index) => index + 1);
    const traces = plot.lines.map((line, index) => ({
      type: "scatter", mode: "lines+markers", name: plain(line.name), x: epochs, y: line.y,
      line: { color: color(`line-${(index % 5) + 1}`), width: 2 }, marker: { size: 6 }, cliponaxis: false,
      hovertext: line.y.map((y, epoch) => `<b>${plain(line.name)}</b><br>${plain(plot.where[epoch])}<br>${y}`),
      hoverinfo: "text",
    }));
    draw(document.getElementById(plot.id), traces, layout({
      margin: { ...margin, t: plot.lines.length > 1 ? 34 : 14 }, showlegend: plot.lines.length > 1,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      xaxis: axis(plot.x, {
        range: [0.5, epochs.length + 0.5], tickformat: "d", ...(epochs.length < 12 ? { dtick: 1 } : { nticks: 10 }),
      }),
      yaxis: axis(plot.y, {}),
    }));
  }

  function all() {
    data.tradeoffs.filter((plot) => plot.points.length).forEach(tradeoff);
    data.histories.forEach(history);
  }

  keep(all);
})();
