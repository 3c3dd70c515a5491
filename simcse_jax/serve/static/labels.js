// Labels beside points, none over another, a point or a leader; those without room are left out.

const HEIGHT = 17;
const GAP = 9;

/**
 * Where labels go.
 *
 * points: [{x, y}], in pixels; widths: of the labels, in the same order; size: {width, height} of the drawing.
 * Returns for each {x, y, leader}, where its text begins, or null. The nearest free of two dozen places is taken; one that
 * is further off has the end of a line to its point as its leader.
 */
export function placeLabels(points, widths, size) {
  const taken = points.map(({ x, y }) => ({ left: x - 6, right: x + 6, top: y - 6, bottom: y + 6 }));
  return points.map((point, number) => {
    for (const place of places(point, widths[number])) {
      const box = place.box;
      const inside = box.left >= 4 && box.right <= size.width - 4 && box.top >= 4 && box.bottom <= size.height - 4;
      const claimed = place.leader ? [box, between(point, place.leader)] : [box];
      if (!inside || taken.some((other, i) => i !== number && claimed.some((mine) => overlap(mine, other)))) continue;
      taken.push(...claimed);
      return place;
    }
    return null;
  });
}

function* places({ x, y }, width) {
  for (const reach of [GAP, 2.4 * GAP, 4 * GAP]) {
    const leader = reach > GAP;
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [1, 1], [-1, -1], [-1, 1]]) {
      const [cx, cy] = [x + dx * reach, y + dy * (reach + HEIGHT / 2)];
      const left = dx > 0 ? cx : dx < 0 ? cx - width : cx - width / 2;
      const box = { left, right: left + width, top: cy - HEIGHT / 2, bottom: cy + HEIGHT / 2 };
      const edge = { x: Math.min(Math.max(x, left), left + width), y: Math.min(Math.max(y, box.top), box.bottom) };
      yield { x: left, y: cy + 4.5, box, leader: leader && edge };
    }
  }
}

const between = (a, b) => ({
  left: Math.min(a.x, b.x) - 1, right: Math.max(a.x, b.x) + 1, top: Math.min(a.y, b.y) - 1, bottom: Math.max(a.y, b.y) + 1,
});

const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
