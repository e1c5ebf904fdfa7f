"use strict";
/* The pictures of a report. Bags are there for objects: image.bags[run][object]. */
for (const root of document.querySelectorAll("[data-pictures]")) {
  const data = JSON.parse(document.getElementById(root.dataset.pictures).textContent);
  const bag = async (image, run, box) => {
    const object = image.truth?.[box.object], found = image.bags[run]?.[box.object];
    if (!object || object[4] !== box.label) return null;
    if (!found) throw new Error("its bag is not in this report");
    const [x0, y0, x1, y1] = object;
    return { anchors: found[0], assigned: found[1], box: { x0, y0, x1, y1 } };
  };
  const { hasTruth, hasMasks, hasBags, score } = data;
  new Viewer(root, data, { hasTruth, hasMasks, score, bag: hasBags ? bag : null });
}
