/* The page `explore`: a family and a price are chosen, and everything shows the fit that they name.

   `explore-data` is written by the page when the site is built: for each family its fits, with
   positions and widths in hundredths and pixels as sixteen greys. Nothing else is loaded. */
"use strict";

(function () {
  const SIZE = 320; // of both pictures, in their own units
  const EDGE = { left: 42, right: 10, top: 12, bottom: 40 };
  const box = document.getElementById("explore");
  const sent = document.getElementById("explore-data");
  if (!box || !sent) return;
  const data = JSON.parse(sent.textContent);
  const names = Object.keys(data.families);
  const $ = (name) => document.getElementById("explore-" + name);

  // ---- small tools

  function make(name, attributes, parent, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  function scale(from, to, start, end) {
    return (value) => start + ((value - from) / (to - from)) * (end - start);
  }

  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const spread = (values) => Math.sqrt(mean(values.map((v) => (v - mean(values)) ** 2)));
  const minus = (value, digits) => value.toFixed(digits).replace("-", "\u2212");
  const number = (value) => (value === null ? "\u2013" : minus(value, 2));

  /** Axes with ticks and their names; the positions of values on them. */
  function axes(svg, xs, ys, xlabel, ylabel, layer) {
    const right = SIZE - EDGE.right, bottom = SIZE - EDGE.bottom;
    const x = scale(xs.from, xs.to, EDGE.left, right), y = scale(ys.from, ys.to, bottom, EDGE.top);
    layer.replaceChildren();
    make("path", { class: "frame", d: `M${EDGE.left},${EDGE.top}V${bottom}H${right}` }, layer);
    for (const value of xs.ticks) {
      make("path", { class: "tick", d: `M${x(value)},${bottom}v4` }, layer);
      make("text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, layer, minus(value, 0));
    }
    for (const value of ys.ticks) {
      make("path", { class: "tick", d: `M${EDGE.left},${y(value)}h-4` }, layer);
      make("text", { x: EDGE.left - 7, y: y(value) + 4, "text-anchor": "end" }, layer, minus(value, 0));
    }
    make("text", { x: (EDGE.left + right) / 2, y: SIZE - 6, "text-anchor": "middle" }, layer, xlabel);
    const middle = (EDGE.top + bottom) / 2;
    const turned = `translate(13,${middle}) rotate(-90)`;
    make("text", { transform: turned, "text-anchor": "middle" }, layer, ylabel);
    return { x, y };
  }

  // ---- the codes: one group per image, which is moved and never made anew

  const codes = $("codes"), frame = make("g", {}, codes);
  const inside = make("g", { "clip-path": "url(#explore-inside)" }, codes);
  const circles = [1, 2].map(() => make("circle", { class: "prior", r: 1 }, inside));
  const clip = make("clipPath", { id: "explore-inside" }, make("defs", {}, codes));
  make("rect", {
    x: EDGE.left, y: EDGE.top,
    width: SIZE - EDGE.left - EDGE.right, height: SIZE - EDGE.top - EDGE.bottom,
  }, clip);
  const order = data.digit.map((_, i) => i).sort((i, j) => data.ten.includes(i) - data.ten.includes(j));
  const groups = [];
  for (const i of order) {
    const kind = data.ten.includes(i) ? "code ten" : "code";
    const group = make("g", { class: kind, style: `color: var(--class-${data.digit[i]})` }, inside);
    make("circle", { class: "sd", r: 1 }, group);
    make("text", {}, group, data.digit[i]);
    groups[i] = group;
  }

  function showCodes(name, fit) {
    const far = Math.max(...fit.mean.flat().map(Math.abs)) / 100;
    const limit = [3, 4, 6, 8, 12, 16].find((l) => l > far) || Math.ceil(far + 1);
    const step = limit > 5 ? (limit > 8 ? 4 : 2) : 1, ticks = [];
    for (let t = -Math.floor(limit / step) * step; t <= limit; t += step) ticks.push(t);
    const axis = { from: -limit, to: limit, ticks };
    const { x, y } = axes(codes, axis, axis, "first latent", "second latent", frame);
    const ux = x(1) - x(0), uy = y(0) - y(1);
    circles.forEach((circle, k) => {
      circle.style.transform = `translate(${x(0)}px, ${y(0)}px) scale(${(k + 1) * ux}, ${(k + 1) * uy})`;
    });
    groups.forEach((group, i) => {
      const [a, b] = fit.mean[i], [sa, sb] = fit.sd[i].map((s) => s / 100);
      group.style.transform = `translate(${x(a / 100)}px, ${y(b / 100)}px)`;
      // the ellipse of one standard deviation: axes and angle of the covariance
      const c = (fit.correlation[i] / 100) * sa * sb;
      const half = (sa * sa + sb * sb) / 2, root = Math.hypot((sa * sa - sb * sb) / 2, c);
      const angle = Math.atan2(2 * c, sa * sa - sb * sb) / 2;
      const long = Math.sqrt(half + root), short = Math.sqrt(Math.max(half - root, 0));
      group.firstChild.style.transform =
        `scale(${ux}, ${uy}) rotate(${-angle}rad) scale(${long}, ${short})`;
    });
    const along = [0, 1].map((k) => spread(fit.mean.map((m) => m[k] / 100)).toFixed(2));
    const width = mean(fit.sd.flat()) / 100;
    codes.setAttribute("aria-label",
      `Codes of ${data.digit.length} test digits under ${name} at beta ${fit.shown}: the means vary ` +
      `with a standard deviation of ${along[0]} along the first latent and ${along[1]} along the ` +
      "second; " + (width ? `each is surrounded by a width of ${width.toFixed(2)} on average.`
        : "each is a point, without a width."));
  }

  // ---- the plane of rate and distortion: drawn once, then chosen from

  const plane = $("plane");
  const fits = names.flatMap((name) => data.families[name]);
  const top = Math.ceil(Math.max(...fits.map((f) => f.distortion)) + 0.5);
  const low = Math.floor(Math.min(...fits.map((f) => f.distortion)) - 1);
  const most = Math.ceil(Math.max(...fits.map((f) => f.rate || 0)) + 0.5);
  const upTo = (from, to, step) => {
    const found = [];
    for (let v = Math.ceil(from / step) * step; v <= to; v += step) found.push(v);
    return found;
  };
  const { x: px, y: py } = axes(plane,
    { from: -0.4, to: most, ticks: upTo(0, most, 2) }, { from: low, to: top, ticks: upTo(low, top, 2) },
    "rate, nats per image", "distortion, nats per image", make("g", {}, plane));
  const curves = {};
  for (const name of names) {
    const layer = (curves[name] = make("g", {}, plane));
    const points = data.families[name].map((f) => [px(f.rate === null ? 0 : f.rate), py(f.distortion)]);
    if (name === "deterministic") continue; // a level, which depends on the price
    make("path", { class: "curve", d: "M" + points.join("L") }, layer);
    for (const [cx, cy] of points) make("circle", { class: "dot", cx, cy, r: 2.5 }, layer);
  }
  const level = make("path", { class: "curve" }, curves.deterministic || plane);
  const equal = make("line", { class: "equal", "clip-path": "url(#explore-inside)" }, plane);
  const point = make("path", { class: "point", d: "M0,-9L9,0L0,9L-9,0Z" }, plane);
  const ends = [make("text", { class: "note" }, plane), make("text", { class: "note" }, plane)];
  const called = make("text", { class: "name" }, plane);

  function showPlane(name, fit, all) {
    for (const other of names) {
      for (const node of curves[other].children) node.classList.toggle("chosen", other === name);
    }
    plane.insertBefore(curves[name], equal); // on top of the other curves
    const dot = data.families.deterministic[Math.min(fit.index, data.betas.length - 1)];
    level.setAttribute("d", `M${px(0)},${py(dot.distortion)}H${px(most)}`);
    const bare = fit.rate === null;
    point.style.display = equal.style.display = bare ? "none" : "";
    for (const end of ends) end.textContent = "";
    let words = `Under ${name} at beta ${fit.shown} `;
    if (bare) {
      words += `the distortion is ${number(fit.distortion)} nats, and a point has no rate.`;
    } else {
      const slope = fit.price, at = (r) => py(fit.distortion - slope * (r - fit.rate));
      point.style.transform = `translate(${px(fit.rate)}px, ${py(fit.distortion)}px)`;
      for (const [k, r] of [[1, -0.4], [2, most]]) {
        equal.setAttribute("x" + k, px(r));
        equal.setAttribute("y" + k, at(r));
      }
      words += `the rate is ${number(fit.rate)} and the distortion ${number(fit.distortion)} nats. `;
      const [first, last] = [all[0], all[all.length - 1]];
      if (all.length > 1) {
        [first, last].forEach((f, k) => {
          ends[k].textContent = `beta ${f.beta}`;
          ends[k].setAttribute("x", px(f.rate) + (k ? 10 : 0));
          ends[k].setAttribute("y", py(f.distortion) + (k ? -6 : 20));
          ends[k].setAttribute("text-anchor", k ? "start" : px(f.rate) > SIZE - 60 ? "end" : "middle");
        });
        words += `Its curve falls from rate ${number(last.rate)} and distortion ` +
          `${number(last.distortion)} at beta ${last.beta} to rate ${number(first.rate)} and ` +
          `distortion ${number(first.distortion)} at beta ${first.beta}.`;
      }
    }
    called.textContent = name === "deterministic" ? "deterministic: no rate" : name;
    const height = bare ? py(fit.distortion) - 8 : EDGE.top + 12;
    called.setAttribute("x", SIZE - EDGE.right);
    called.setAttribute("y", height);
    called.setAttribute("text-anchor", "end");
    plane.setAttribute("aria-label", words);
  }

  // ---- images

  function paint(canvas, images) {
    canvas.width = 9 * images.length - 1;
    canvas.height = 8;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const pixels = context.createImageData(canvas.width, 8);
    images.forEach((image, k) => {
      [...image].forEach((grey, i) => {
        const start = 4 * ((i >> 3) * canvas.width + 9 * k + (i & 7));
        pixels.data.fill(255 - 17 * parseInt(grey, 16), start, start + 3);
        pixels.data[start + 3] = 255;
      });
    });
    context.putImageData(pixels, 0, 0);
  }

  const inked = (grey) => parseInt(grey, 16) > 7;

  function showImages(name, fit) {
    paint($("back"), fit.back);
    paint($("drawn"), fit.drawn);
    const right = fit.back.map((image, k) => [...image].filter((grey, i) =>
      inked(grey) === inked(data.images[k][i])).length);
    const ink = fit.drawn.map((image) => [...image].filter(inked).length);
    const under = `under ${name} at beta ${fit.shown}`;
    $("back").setAttribute("aria-label",
      `The digits 0 to 9 as they come back ${under}: on average ${mean(right).toFixed(1)} of 64 ` +
      "pixels are on the right side of one half.");
    $("drawn").setAttribute("aria-label",
      `Ten images decoded from draws of the prior ${under}: on average ${mean(ink).toFixed(1)} of ` +
      "64 pixels are more probably ink than not.");
  }

  // ---- numbers and controls

  function showNumbers(fit) {
    const rows = { rate: fit.rate, distortion: fit.distortion, ELBO: fit.elbo, loss: fit.loss };
    $("numbers").replaceChildren();
    for (const name in rows) {
      const row = document.createElement("div");
      row.innerHTML = `<dt>${name}</dt><dd id="explore-${name}">${number(rows[name])}</dd>`;
      $("numbers").appendChild(row);
    }
  }

  function show() {
    const name = box.querySelector("input[name=family]:checked").value;
    const index = Number($("beta").value), price = data.betas[index], all = data.families[name];
    const fit = { ...all[Math.min(index, all.length - 1)], index, price, shown: String(price) };
    $("price").textContent = fit.shown;
    $("beta").setAttribute("aria-valuetext", `beta ${fit.shown}`);
    showNumbers(fit);
    showCodes(name, fit);
    showPlane(name, fit, all);
    showImages(name, fit);
  }

  for (const name of names) {
    const label = document.createElement("label");
    label.innerHTML = `<input type="radio" name="family" value="${name}"> ${name}`;
    $("families").appendChild(label);
    label.firstChild.checked = name === "mean_scale";
  }
  $("beta").max = data.betas.length - 1;
  $("beta").value = data.betas.indexOf(1);
  data.betas.forEach((beta, k) => {
    const tick = $("ticks").appendChild(document.createElement("span"));
    tick.textContent = beta;
    tick.style.left = `${(100 * k) / (data.betas.length - 1)}%`;
  });
  paint($("data-row"), data.images);
  $("data-row").setAttribute("aria-label", "Ten test images, one of each digit from 0 to 9.");
  box.addEventListener("input", show);
  box.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  box.hidden = false;
  $("without").hidden = true;
  show();
})();
