(() => {
  "use strict";
  const root = document.documentElement;
  const stored = (value) => {
    try { return value === undefined ? localStorage.getItem("sfumato-theme") : localStorage.setItem("sfumato-theme", value); } catch { return null; }
  };
  const theme = stored();
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  function themeButton(button) {
    button.addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      stored(root.dataset.theme);
    });
  }

  function slider(figure) {
    const stage = figure.querySelector(".stage");
    const range = stage.querySelector("input");
    const left = stage.querySelector(".left .label").textContent;
    const label = stage.querySelector(".right .label");
    const images = [...stage.querySelectorAll(".right img")];
    const tabs = [...figure.querySelectorAll("[role=tab]")];
    const place = (percent) => {
      range.value = percent;
      range.setAttribute("aria-valuetext", `${Math.round(percent)} % ${left}, the rest ${label.textContent}`);
      figure.style.setProperty("--pos", `${clamp(percent, 0, 100)}%`);
    };
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      place(((event.clientX - box.left) / box.width) * 100);
    };
    stage.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      stage.setPointerCapture(event.pointerId);
      if (event.pointerType === "mouse") follow(event);
      range.focus({ preventScroll: true, focusVisible: false });
      event.preventDefault();
    });
    stage.addEventListener("pointermove", (event) => { if (stage.hasPointerCapture(event.pointerId)) follow(event); });
    stage.addEventListener("click", follow);
    range.addEventListener("click", (event) => event.stopPropagation());
    range.addEventListener("input", () => place(+range.value));
    const choose = (chosen) => {
      tabs.forEach((tab, i) => { tab.setAttribute("aria-selected", i === chosen); tab.tabIndex = i === chosen ? 0 : -1; });
      images.forEach((image, i) => { image.hidden = i !== chosen; });
      label.textContent = images[chosen].dataset.label;
      stage.setAttribute("aria-labelledby", tabs[chosen].id);
      range.setAttribute("aria-label", `Divider between ${left} and ${label.textContent}`);
      place(+range.value);
    };
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => choose(i));
      tab.addEventListener("keydown", (event) => {
        const to = { ArrowRight: (i + 1) % tabs.length, ArrowLeft: (i + tabs.length - 1) % tabs.length, Home: 0, End: tabs.length - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        choose(to);
        tabs[to].focus();
      });
    });
    place(50);
  }

  // Every lens shows its own picture at the same share of width and height, so that pictures of unlike sizes stay in step.
  function lightbox(dialog) {
    const board = dialog.querySelector(".lenses");
    const does = (name) => dialog.querySelector(`[data-do=${name}]`);
    let lenses = [], current = 0, together = true, zoom = 1, x = 0.5, y = 0.5;
    const shown = () => (together ? lenses : [lenses[current]]);
    const fit = (lens) => Math.min(lens.box.clientWidth / lens.width, lens.box.clientHeight / lens.height);

    function arrange() {
      const count = shown().length, { clientWidth: w, clientHeight: h } = board;
      let best = { size: -1, cols: 1 };
      for (let cols = 1; cols <= count; cols++) {
        const size = Math.min(w / cols / lenses[0].width, h / Math.ceil(count / cols) / lenses[0].height);
        if (size > best.size) best = { size, cols };
      }
      board.style.gridTemplateColumns = `repeat(${best.cols}, minmax(0, 1fr))`;
      board.style.gridTemplateRows = `repeat(${Math.ceil(count / best.cols)}, minmax(0, 1fr))`;
      lenses.forEach((lens) => { lens.box.hidden = !shown().includes(lens); });
      draw();
    }
    function draw() {
      const first = shown()[0], base = fit(first);
      zoom = clamp(zoom, 1, Math.max(8, 32 / base));
      const half = (space, size) => Math.min(0.5, space / size / base / zoom / 2);
      const dx = half(first.box.clientWidth, first.width), dy = half(first.box.clientHeight, first.height);
      x = clamp(x, dx, 1 - dx);
      y = clamp(y, dy, 1 - dy);
      for (const lens of shown()) {
        const scale = fit(lens) * zoom;
        const left = lens.box.clientWidth / 2 - x * lens.width * scale, top = lens.box.clientHeight / 2 - y * lens.height * scale;
        lens.image.style.transform = `translate(${left}px, ${top}px) scale(${scale})`;
        lens.image.classList.toggle("pixels", scale >= 2);
      }
      does("fit").textContent = `${Math.round(base * zoom * 100)} %`;
      does("together").setAttribute("aria-pressed", together);
      const one = lenses.length < 2;
      for (const name of ["previous", "next", "together"]) does(name).hidden = one;
      dialog.querySelector(".where").textContent = together && !one ? `${lenses.length} pictures in step` : `${lenses[current].label}${one ? "" : ` (${current + 1} of ${lenses.length})`}`;
    }
    function zoomBy(factor, lens, clientX, clientY) {
      const box = lens.box.getBoundingClientRect(), before = fit(lens) * zoom;
      const px = (clientX - box.left - box.width / 2) / lens.width, py = (clientY - box.top - box.height / 2) / lens.height;
      zoom = clamp(zoom * factor, 1, Math.max(8, 32 / fit(lens)));
      const after = fit(lens) * zoom;
      x += px / before - px / after;
      y += py / before - py / after;
      draw();
    }
    const zoomMiddle = (factor) => { zoom *= factor; draw(); };
    const flip = (by) => {
      if (!together) current = (current + by + lenses.length) % lenses.length;
      together = false;
      arrange();
    };
    function move(lens, dx, dy) {
      const scale = fit(lens) * zoom;
      x -= dx / lens.width / scale;
      y -= dy / lens.height / scale;
      draw();
    }
    function hands(lens) {
      const points = new Map();
      lens.box.addEventListener("pointerdown", (event) => {
        lens.box.setPointerCapture(event.pointerId);
        points.set(event.pointerId, event);
        current = lenses.indexOf(lens);
      });
      lens.box.addEventListener("pointermove", (event) => {
        const last = points.get(event.pointerId);
        if (!last) return;
        const other = [...points.values()].find((point) => point.pointerId !== event.pointerId);
        points.set(event.pointerId, event);
        if (other) {
          const spread = (point) => Math.hypot(point.clientX - other.clientX, point.clientY - other.clientY) || 1;
          zoomBy(spread(event) / spread(last), lens, (event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2);
        }
        move(lens, (event.clientX - last.clientX) / points.size, (event.clientY - last.clientY) / points.size);
      });
      for (const end of ["pointerup", "pointercancel"]) lens.box.addEventListener(end, (event) => points.delete(event.pointerId));
      lens.box.addEventListener("wheel", (event) => {
        event.preventDefault();
        zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), lens, event.clientX, event.clientY);
      }, { passive: false });
      lens.box.addEventListener("dblclick", (event) => zoomBy(zoom > 1.01 ? 1 / zoom : 4, lens, event.clientX, event.clientY));
    }
    function open(group, start) {
      board.replaceChildren();
      lenses = [...group.querySelectorAll("img[data-label]")].map((source) => {
        const box = document.createElement("div"), image = new Image(), label = document.createElement("span");
        box.className = "lens";
        label.className = "label";
        label.textContent = source.dataset.label;
        image.src = source.src;
        image.alt = source.alt;
        image.draggable = false;
        box.append(image, label);
        board.append(box);
        const lens = { box, image, label: source.dataset.label, width: source.naturalWidth || 1, height: source.naturalHeight || 1 };
        hands(lens);
        return lens;
      });
      current = start;
      together = innerWidth > 700 || lenses.length < 3;
      zoom = 1;
      x = y = 0.5;
      dialog.showModal();
      arrange();
    }
    const actions = {
      previous: () => flip(-1), next: () => flip(1), together: () => { together = !together; arrange(); },
      in: () => zoomMiddle(1.5), out: () => zoomMiddle(1 / 1.5), fit: () => { zoom = 1; draw(); }, close: () => dialog.close(),
    };
    for (const [name, act] of Object.entries(actions)) does(name).addEventListener("click", act);
    const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    dialog.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const keys = { "+": "in", "=": "in", "-": "out", "0": "fit", a: "together", A: "together" };
      const sideways = event.key === "ArrowLeft" || event.key === "ArrowRight";
      if (step[event.key] && (event.shiftKey || !sideways)) move(shown()[0], ...step[event.key]);
      else if (sideways && lenses.length > 1) flip(event.key === "ArrowLeft" ? -1 : 1);
      else if (keys[event.key]) actions[keys[event.key]]();
      else return;
      event.preventDefault();
    });
    addEventListener("resize", () => { if (dialog.open) arrange(); });
    return open;
  }

  document.addEventListener("DOMContentLoaded", () => {
    themeButton(document.querySelector(".theme"));
    document.querySelectorAll(".slider").forEach(slider);
    const open = lightbox(document.querySelector(".lightbox"));
    document.querySelectorAll("[data-lightbox]").forEach((group) => {
      group.querySelectorAll(".shot button, .enlarge").forEach((button, i) => button.addEventListener("click", () => open(group, i)));
    });
    addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => { details.open = true; }));
  });
})();
