"""Rays against boxes, spheres, cylinders and a floor, compiled for one core: what a frame's pixels show.

Distances are MuJoCo's (`mj_ray`) up to rounding. Two things make it fast. Pixels are drawn in tiles of 8x8, and a tile
tests only geoms whose bounding sphere lies in its cone, its shadows only those between it and the light. And four rays
a pixel, each to a light of its own, are cast only where a neighbour shows another geom, face or set of lights, or where
colour bends; where only the floor's pattern differs, four points of it will do; elsewhere the centre stands for all.

All that is compiled is in this file: the cache on disk notices changes of this file alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import from_dtype, njit, types

TINY = 1e-15  # MuJoCo's mjMINVAL
PLANE, SPHERE, CYLINDER, BOX = 0, 2, 5, 6  # of mujoco.mjtGeom
TILE = 8  # pixels
SLACK = 1e-3  # metres that a shadow begins before what it falls on
BEND = 12 / 255  # second difference of colours up to which the centre's is the mean of four (an error of 1/32 of it)
GRAIN = 2.0  # radians between pixels up to which the same holds for the grain of wood
FLAT, PATTERN, EDGE = 0, 1, 2  # what is between a pixel and its neighbours
SURFACE = (1 << 18) - 1  # the part of a key that says geom, face and lights
SKY = (0.72, 0.82, 0.92)
Triple = tuple[float, float, float]

GEOM = np.dtype(
    [
        ("kind", "i8"),
        ("thing", "i8"),  # -1 = background
        ("size", "f8", 3),  # half sizes, as MuJoCo has them
        ("radius", "f8"),  # of the bounding sphere
        ("center", "f8", 3),
        ("turn", "f8", (3, 3)),  # geom to world
        ("away", "f8", (5, 3)),  # from the centre to five origins of rays: the camera, four lights
        ("local", "f8", (5, 3)),  # the same in the frame of the geom
        ("outside", "f8", 5),  # squared length of that, less the squared radius
        ("color", "f8", 3),
        ("stripe", "f8", 3),  # change of the stripes' phase per metre
        ("turns", "f8", (2, 3, 3)),  # of the thing, now and in the next frame
        ("places", "f8", (2, 3)),
        ("moves", "i8"),
    ]
)
VIEW = np.dtype(
    [
        ("origins", "f8", (5, 3)),  # the camera, four lights
        ("lamp", "f8", 3),  # the middle of the lights
        ("spread", "f8"),  # their distance from it, metres
        ("far", "f8"),  # what no ray hits, and what lies beyond, is at this distance
        ("axes", "f8", (2, 3, 3)),  # right, down, forward of the camera, now and in the next frame
        ("positions", "f8", (2, 3)),
        ("focal", "f8"),  # pixels
        ("floor", "f8", (2, 3)),  # colours
        ("tile", "f8"),  # metres
        ("wood", "i8"),
    ]
)
compiled = njit(error_model="numpy")


# --------------------------------------------------------------------------------------------- where a ray meets a geom


@compiled
def first_root(a: float, b: float, c: float) -> float:
    """The first t >= 0 of a t^2 + 2 b t + c = 0, or -1."""
    root = b * b - a * c
    if root < TINY:
        return -1.0
    root = math.sqrt(root)
    t = (-b - root) / a
    return t if t >= 0 else max((-b + root) / a, -1.0)


@compiled
def meet_box(l: Triple, w: Triple, s: Triple) -> tuple[float, int]:
    """Distance and face (its axis) of a ray from l along w, all in the frame of the box; only faces it can enter by."""
    inside = abs(l[0]) <= s[0] and abs(l[1]) <= s[1] and abs(l[2]) <= s[2]
    best, face = -1.0, -1
    for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        way = (s[i] if (w[i] > 0) == inside else -s[i]) - l[i]
        if abs(w[i]) > TINY and way * w[i] >= 0:
            t = way / w[i]
            if (face < 0 or t < best) and abs(l[j] + t * w[j]) <= s[j] and abs(l[k] + t * w[k]) <= s[k]:
                best, face = t, i
    return best, face


@compiled
def meet_cylinder(l: Triple, w: Triple, radius: float, half: float) -> tuple[float, int]:
    """The same for a cylinder: face 2 is a cap, 3 is round."""
    best, face = -1.0, -1
    if abs(w[2]) > TINY:
        for side in (-half, half):
            t = (side - l[2]) / w[2]
            x, y = l[0] + t * w[0], l[1] + t * w[1]
            if t >= 0 and (face < 0 or t < best) and x * x + y * y <= radius * radius:
                best, face = t, 2
    square = l[0] * l[0] + l[1] * l[1] - radius * radius
    t = first_root(w[0] * w[0] + w[1] * w[1], w[0] * l[0] + w[1] * l[1], square)
    if t >= 0 and abs(l[2] + t * w[2]) <= half and (face < 0 or t < best):
        best, face = t, 3
    return best, face


@compiled
def into(turn: np.ndarray, x: float, y: float, z: float) -> Triple:
    """A vector of the world in the frame that `turn` turns into the world."""
    return (
        turn[0, 0] * x + turn[1, 0] * y + turn[2, 0] * z,
        turn[0, 1] * x + turn[1, 1] * y + turn[2, 1] * z,
        turn[0, 2] * x + turn[1, 2] * y + turn[2, 2] * z,
    )


@compiled
def meet(geom: np.void, o: int, v: Triple, limit: float) -> tuple[float, int]:
    """Distance at which the unit ray v from origin o meets a geom, and the face; or -1: not, or not before `limit`."""
    if geom.kind == PLANE:
        down = into(geom.turn, v[0], v[1], v[2])[2]
        return (-geom.local[o, 2] / down if down < -TINY else -1.0), 2
    b, c = v[0] * geom.away[o, 0] + v[1] * geom.away[o, 1] + v[2] * geom.away[o, 2], geom.outside[o]
    if c > 0 and b > 0:
        return -1.0, -1
    a = v[0] * v[0] + v[1] * v[1] + v[2] * v[2]
    root = b * b - a * c
    if root < TINY or -b - math.sqrt(root) > limit:
        return -1.0, -1
    if geom.kind == SPHERE:
        return first_root(a, b, c), 3
    l, w = (geom.local[o, 0], geom.local[o, 1], geom.local[o, 2]), into(geom.turn, v[0], v[1], v[2])
    if geom.kind == BOX:
        return meet_box(l, w, (geom.size[0], geom.size[1], geom.size[2]))
    return meet_cylinder(l, w, geom.size[0], geom.size[1])


@compiled
def nearest(geoms: np.ndarray, o: int, v: Triple, among: np.ndarray, count: int) -> tuple[float, int, int]:
    """Distance, geom (-1 = sky) and face of what a ray meets first."""
    best, found, face = 1e6, -1, -1
    for k in range(count):
        t, side = meet(geoms[among[k]], o, v, best)
        if 0 <= t < best:
            best, found, face = t, among[k], side
    return best, found, face


@compiled
def is_blocked(geoms: np.ndarray, o: int, v: Triple, reach: float, among: np.ndarray, count: int, own: int) -> bool:
    """Whether the ray v from light o to a point of geom `own` meets another first; `own`, convex, faces the light."""
    limit = reach - SLACK
    for k in range(count):
        if among[k] != own:
            t, _ = meet(geoms[among[k]], o, v, limit)
            if 0 <= t <= limit:
                return True
    return False


# -------------------------------------------------------------------------------------------------------------- colours


@compiled
def normal_of(geom: np.void, face: int, p: Triple) -> Triple:
    """Unit and outwards, at a point of the world on the geom."""
    turn = geom.turn
    if geom.kind == PLANE:
        return turn[0, 2], turn[1, 2], turn[2, 2]
    x, y, z = p[0] - geom.center[0], p[1] - geom.center[1], p[2] - geom.center[2]
    if face == 3:
        along = into(turn, x, y, z)[2] if geom.kind == CYLINDER else 0.0
        radius = geom.size[0]
        return (x - along * turn[0, 2]) / radius, (y - along * turn[1, 2]) / radius, (z - along * turn[2, 2]) / radius
    side = 1.0 if into(turn, x, y, z)[face] > 0 else -1.0
    return side * turn[0, face], side * turn[1, face], side * turn[2, face]


@compiled
def floor_color(view: np.void, p: Triple) -> tuple[float, float, float, int, float]:
    """Checker, or planks with a grain; which square or plank it is; and the phase of the grain."""
    x, y, grain = p[0] / view.tile, p[1] / view.tile, 0.0
    if view.wood:
        plank = math.floor(2 * y)
        grain = 23 * y + 1.5 * math.sin(2.1 * x + plank)
        tone = 0.5 + 0.35 * math.sin(12.9898 * plank) + 0.15 * math.sin(grain)
        cell = int(plank)
    else:
        column, row = int(math.floor(x)), int(math.floor(y))
        tone, cell = float((column + row) % 2), column * 4096 + row
    one, other = view.floor[0], view.floor[1]
    return (
        one[0] + tone * (other[0] - one[0]),
        one[1] + tone * (other[1] - one[1]),
        one[2] + tone * (other[2] - one[2]),
        cell,
        grain,
    )


@compiled
def paint(geom: np.void, view: np.void, p: Triple) -> tuple[float, float, float, int, float]:
    """Colour at a point before it is lit; of the floor, the square and the grain's phase."""
    if geom.kind == PLANE:
        return floor_color(view, p)
    tone, origin = 1.0, geom.places[0]
    if geom.thing >= 0:
        x, y, z = p[0] - origin[0], p[1] - origin[1], p[2] - origin[2]
        tone = 0.94 + 0.06 * math.sin(geom.stripe[0] * x + geom.stripe[1] * y + geom.stripe[2] * z)
    return tone * geom.color[0], tone * geom.color[1], tone * geom.color[2], 0, 0.0


@compiled
def towards(origin: np.ndarray, p: Triple, normal: Triple) -> tuple[Triple, float, float]:
    """Unit ray from a light to a point, its length, and the share of light that the surface there takes."""
    x, y, z = p[0] - origin[0], p[1] - origin[1], p[2] - origin[2]
    reach = math.sqrt(x * x + y * y + z * z)
    v = (x / reach, y / reach, z / reach)
    return v, reach, -(v[0] * normal[0] + v[1] * normal[1] + v[2] * normal[2])


@compiled
def is_near(geom: np.void, view: np.void, v: Triple, reach: float) -> bool:
    """Whether a geom's sphere touches the thin cone from the lights (its base) to a point: v, reach are its axis'."""
    x, y, z = geom.center[0] - view.lamp[0], geom.center[1] - view.lamp[1], geom.center[2] - view.lamp[2]
    ahead = min(max(x * v[0] + y * v[1] + z * v[2], 0.0), reach)
    x, y, z = x - ahead * v[0], y - ahead * v[1], z - ahead * v[2]
    most = 1.01 * geom.radius + (1 - ahead / reach) * view.spread
    return x * x + y * y + z * z <= most * most


@compiled
def light_on(
    geoms: np.ndarray, view: np.void, g: int, p: Triple, normal: Triple, among: np.ndarray, count: int
) -> tuple[float, int]:
    """Mean light of the four on a point of geom g, and which of them shine on it, as bits."""
    v, reach, facing = towards(view.lamp, p, normal)
    if facing * reach < -view.spread:
        return 0.0, 0
    differ = facing * reach < view.spread or abs(reach - view.far) < view.spread + SLACK
    for k in range(count):
        differ = differ or (among[k] != g and is_near(geoms[among[k]], view, v, reach))
    if not differ:
        return (facing, 15) if reach < view.far else (0.0, 0)
    light, mask = 0.0, 0
    for o in range(1, 5):
        v, reach, facing = towards(view.origins[o], p, normal)
        mask *= 2
        if facing > 0 and reach - SLACK < view.far and not is_blocked(geoms, o, v, reach, among, count, g):
            light, mask = light + facing / 4, mask + 1
    return light, mask


@compiled
def ray_of(view: np.void, x: float, y: float, size: tuple[int, int]) -> Triple:
    """Unit ray of the camera through a place in the picture."""
    right, down, ahead = x - (size[0] - 1) / 2, y - (size[1] - 1) / 2, view.focal
    length = math.sqrt(right * right + down * down + ahead * ahead)
    return from_camera(view.axes[0], right / length, down / length, ahead / length)


@compiled
def from_camera(axes: np.ndarray, right: float, down: float, ahead: float) -> Triple:
    return (
        right * axes[0, 0] + down * axes[1, 0] + ahead * axes[2, 0],
        right * axes[0, 1] + down * axes[1, 1] + ahead * axes[2, 1],
        right * axes[0, 2] + down * axes[1, 2] + ahead * axes[2, 2],
    )


@compiled
def end_of(view: np.void, v: Triple, distance: float) -> Triple:
    """Where a ray of the camera ends, at most `far` away."""
    distance, origin = min(distance, view.far), view.origins[0]
    return origin[0] + distance * v[0], origin[1] + distance * v[1], origin[2] + distance * v[2]


# ----------------------------------------------------------------------------------------------- what concerns one tile


@compiled
def list_seen(geoms: np.ndarray, middle: Triple, cosine: float, among: np.ndarray) -> int:
    """Geoms that reach into the cone around a unit ray of the camera; returns how many."""
    count, sine = 0, math.sqrt(max(1 - cosine * cosine, 0.0))
    for g in range(len(geoms)):
        x, y, z = -geoms[g].away[0, 0], -geoms[g].away[0, 1], -geoms[g].away[0, 2]
        ahead = x * middle[0] + y * middle[1] + z * middle[2]
        across = math.sqrt(max(x * x + y * y + z * z - ahead * ahead, 0.0))
        if geoms[g].kind == PLANE or across * cosine - ahead * sine <= 1.001 * geoms[g].radius:
            among[count] = g
            count += 1
    return count


@compiled
def list_shading(geoms: np.ndarray, view: np.void, ball: np.ndarray, among: np.ndarray) -> int:
    """Geoms that may stand between the lights and a ball: never the floor, which lies below both."""
    lamp = view.lamp
    x, y, z = ball[0] - lamp[0], ball[1] - lamp[1], ball[2] - lamp[2]
    length, count = x * x + y * y + z * z, 0
    for g in range(len(geoms)):
        dx, dy, dz = geoms[g].center[0] - lamp[0], geoms[g].center[1] - lamp[1], geoms[g].center[2] - lamp[2]
        part = min(max((dx * x + dy * y + dz * z) / length, 0.0), 1.0)
        dx, dy, dz = dx - part * x, dy - part * y, dz - part * z
        most = 1.01 * geoms[g].radius + ball[3] + max(view.spread - ball[3], 0.0) * (1 - part)
        if geoms[g].kind != PLANE and dx * dx + dy * dy + dz * dz <= most * most:
            among[count] = g
            count += 1
    return count


@compiled
def project(view: np.void, when: int, p: Triple, size: tuple[int, int]) -> Triple:
    """x and y in pixels, depth in metres; as in clips.camera."""
    axes, origin = view.axes[when], view.positions[when]
    x, y, z = p[0] - origin[0], p[1] - origin[1], p[2] - origin[2]
    right = axes[0, 0] * x + axes[0, 1] * y + axes[0, 2] * z
    down = axes[1, 0] * x + axes[1, 1] * y + axes[1, 2] * z
    depth = axes[2, 0] * x + axes[2, 1] * y + axes[2, 2] * z
    return view.focal * right / depth + (size[0] - 1) / 2, view.focal * down / depth + (size[1] - 1) / 2, depth


@compiled
def moved(geom: np.void, p: Triple) -> Triple:
    """Where a point of a thing is in the next frame."""
    here, there, after = geom.places[0], geom.places[1], geom.turns[1]
    a, b, c = into(geom.turns[0], p[0] - here[0], p[1] - here[1], p[2] - here[2])
    return (
        after[0, 0] * a + after[0, 1] * b + after[0, 2] * c + there[0],
        after[1, 0] * a + after[1, 1] * b + after[1, 2] * c + there[1],
        after[2, 0] * a + after[2, 1] * b + after[2, 2] * c + there[2],
    )


@compiled
def flow_of(view: np.void, p: Triple, q: Triple, size: tuple[int, int]) -> Triple:
    """Flow in pixels of a point that goes from p to q, and its depth at p."""
    x0, y0, depth = project(view, 0, p, size)
    x1, y1, later = project(view, 1, q, size)
    if later <= 0.05:  # what ends behind the camera has no flow
        return 0.0, 0.0, depth
    return x1 - x0, y1 - y0, depth


# ---------------------------------------------------------------------------------------------------------- the picture


@compiled
def cone_of(view: np.void, left: int, right: int, top: int, bottom: int, size: tuple[int, int]) -> tuple[Triple, float]:
    """Axis of a tile's cone of rays, and the cosine of its half angle."""
    middle, cosine = ray_of(view, (left + right - 1) / 2, (top + bottom - 1) / 2, size), 1.0
    for y in (top - 0.5, bottom - 0.5):
        for x in (left - 0.5, right - 0.5):
            v = ray_of(view, x, y, size)
            cosine = min(cosine, v[0] * middle[0] + v[1] * middle[1] + v[2] * middle[2])
    return middle, cosine - 1e-9


@compiled
def shade(
    geoms: np.ndarray, view: np.void, g: int, face: int, p: Triple, among: np.ndarray, count: int
) -> tuple[float, float, float, int, float, float]:
    """Colour under four lights; a number for square, geom, face and the lights in sight; the grain; brightness."""
    if g < 0:
        return SKY[0], SKY[1], SKY[2], -1, 0.0, 1.0
    light, mask = light_on(geoms, view, g, p, normal_of(geoms[g], face, p), among, count)
    red, green, blue, cell, grain = paint(geoms[g], view, p)
    bright = 0.45 + 0.65 * light
    key = (cell * 4096 + g) * 64 + face * 16 + mask
    return red * bright, green * bright, blue * bright, key, grain, bright


@compiled
def enclose(points: np.ndarray, hits: np.ndarray, count: int, ball: np.ndarray) -> bool:
    """A sphere around a tile's points on geoms; False if there are none."""
    low, high = (np.inf, np.inf, np.inf), (-np.inf, -np.inf, -np.inf)
    for n in range(count):
        if hits[n, 0] >= 0:
            x, y, z = points[n, 0], points[n, 1], points[n, 2]
            low = (min(low[0], x), min(low[1], y), min(low[2], z))
            high = (max(high[0], x), max(high[1], y), max(high[2], z))
    x, y, z = high[0] - low[0], high[1] - low[1], high[2] - low[2]
    ball[0], ball[1], ball[2] = low[0] + x / 2, low[1] + y / 2, low[2] + z / 2
    ball[3] = 0.55 * math.sqrt(x * x + y * y + z * z) + 0.01  # a tenth more, for rays between the centres
    return x >= 0


@compiled
def look_around(key: np.ndarray, color: np.ndarray, y: int, x: int) -> int:
    """FLAT: the four neighbours show the same and colour does not bend; PATTERN: only the floor's pattern differs."""
    height, width = key.shape
    if y == 0 or x == 0 or y == height - 1 or x == width - 1:
        return EDGE
    flat, own = True, key[y, x]
    for up, left in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        other = key[y + up, x + left]
        if (own ^ other) & SURFACE:
            return EDGE
        flat = flat and own == other and abs(color[y + up, x + left, 3] - color[y, x, 3]) < GRAIN
    for i in range(3):
        twice = 2 * color[y, x, i]
        bend = abs(color[y - 1, x, i] + color[y + 1, x, i] - twice)
        flat = flat and bend + abs(color[y, x - 1, i] + color[y, x + 1, i] - twice) < BEND
    if flat:
        return FLAT
    return PATTERN if own & SURFACE < 64 else EDGE  # geom 0 is the floor


@compiled
def mean_of_floor(geoms: np.ndarray, view: np.void, y: int, x: int, size: tuple[int, int], bright: float) -> Triple:
    """The floor's colour at the quarters of a pixel, in the light of its centre."""
    red, green, blue = 0.0, 0.0, 0.0
    for dy in (-0.25, 0.25):
        for dx in (-0.25, 0.25):
            v = ray_of(view, x + dx, y + dy, size)
            r, g, b, _, _ = floor_color(view, end_of(view, v, meet(geoms[0], 0, v, view.far)[0]))
            red, green, blue = red + r * bright / 4, green + g * bright / 4, blue + b * bright / 4
    return red, green, blue


@compiled
def mean_of_four(
    geoms: np.ndarray, view: np.void, y: int, x: int, size: tuple[int, int], seen: np.ndarray, seen_count: int,
    shading: np.ndarray, shading_count: int, ball: np.ndarray, every: np.ndarray,
) -> Triple:  # fmt: skip
    """Four rays through the quarters of a pixel, each shaded by a light of its own."""
    red, green, blue = 0.0, 0.0, 0.0
    for o in range(1, 5):
        v = ray_of(view, x + ((o - 1) % 2 - 0.5) / 2, y + ((o - 1) // 2 - 0.5) / 2, size)
        distance, g, face = nearest(geoms, 0, v, seen, seen_count)
        if g < 0:
            red, green, blue = red + SKY[0] / 4, green + SKY[1] / 4, blue + SKY[2] / 4
            continue
        p = end_of(view, v, distance)
        v, reach, facing = towards(view.origins[o], p, normal_of(geoms[g], face, p))
        light = facing if facing > 0 and reach - SLACK < view.far else 0.0
        dx, dy, dz = p[0] - ball[0], p[1] - ball[1], p[2] - ball[2]
        if light > 0 and dx * dx + dy * dy + dz * dz <= ball[3] * ball[3]:
            light *= not is_blocked(geoms, o, v, reach, shading, shading_count, g)
        elif light > 0:  # far from where the tile's centres end
            light *= not is_blocked(geoms, o, v, reach, every, len(every), g)
        r, g_, b, _, _ = paint(geoms[g], view, p)
        bright = (0.45 + 0.65 * light) / 4
        red, green, blue = red + r * bright, green + g_ * bright, blue + b * bright
    return red, green, blue


@compiled
def to_byte(value: float) -> int:
    return int(min(max(value, 0.0), 1.0) * 255 + 0.5)


@compiled
def cast_tile(
    geoms: np.ndarray, view: np.void, box: tuple[int, int, int, int], seen: np.ndarray, points: np.ndarray,
    hits: np.ndarray, flow: np.ndarray, ids: np.ndarray, depth: np.ndarray,
) -> int:  # fmt: skip
    """A ray through each centre: what it meets, as points and hits (geom, face), and its motion. Counts what it saw."""
    size, inside = (depth.shape[1], depth.shape[0]), 0
    left, right, top, bottom = box
    middle, cosine = cone_of(view, left, right, top, bottom, size)
    count = list_seen(geoms, middle, cosine, seen)
    for y in range(top, bottom):
        for x in range(left, right):
            v = ray_of(view, x, y, size)
            distance, g, face = nearest(geoms, 0, v, seen, count)
            p = end_of(view, v, distance)
            q = moved(geoms[g], p) if g >= 0 and geoms[g].moves else p
            flow[0, y, x], flow[1, y, x], depth[y, x] = flow_of(view, p, q, size)
            ids[y, x] = geoms[g].thing + 1 if g >= 0 else 0
            points[inside, 0], points[inside, 1], points[inside, 2] = p
            hits[inside, 0], hits[inside, 1] = g, face
            inside += 1
    return count


@compiled
def shade_tile(
    geoms: np.ndarray, view: np.void, box: tuple[int, int, int, int], shading: np.ndarray, ball: np.ndarray,
    points: np.ndarray, hits: np.ndarray, color: np.ndarray, key: np.ndarray,
) -> int:  # fmt: skip
    """Colours and keys of the centres. Returns how many geoms may shade the tile."""
    left, right, top, bottom = box
    inside = (right - left) * (bottom - top)
    count = list_shading(geoms, view, ball, shading) if enclose(points, hits, inside, ball) else 0
    inside = 0
    for y in range(top, bottom):
        for x in range(left, right):
            p = (points[inside, 0], points[inside, 1], points[inside, 2])
            found = shade(geoms, view, hits[inside, 0], hits[inside, 1], p, shading, count)
            color[y, x, 0], color[y, x, 1], color[y, x, 2], key[y, x], color[y, x, 3], color[y, x, 4] = found
            inside += 1
    return count


SIGNATURE = types.void(  # given, so that importing this compiles it, before there is more than one process
    types.Array(from_dtype(GEOM), 1, "C"), types.Array(from_dtype(VIEW), 1, "C"), types.uint8[:, :, ::1],
    types.float32[:, :, ::1], types.uint8[:, ::1], types.float32[:, ::1],
)  # fmt: skip


def kept(function: Callable) -> Callable:
    """Numba's function of SIGNATURE; its machine code stays on disk, where there is room for it."""
    try:
        return njit(SIGNATURE, cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):  # a read-only install of a user without a home; a full disk
        return njit(SIGNATURE, error_model="numpy")(function)


@kept
def draw(
    geoms: np.ndarray, views: np.ndarray, rgb: np.ndarray, flow: np.ndarray, ids: np.ndarray, depth: np.ndarray
) -> None:
    """Draws one frame. geoms [N] of GEOM, views [1] of VIEW; fills rgb [H, W, 3], flow [2, H, W], ids, depth [H, W]."""
    height, width = depth.shape
    size, view, across = (width, height), views[0], (width + TILE - 1) // TILE
    tiles = across * ((height + TILE - 1) // TILE)
    seen, shading = np.zeros((tiles, len(geoms)), np.int64), np.zeros((tiles, len(geoms)), np.int64)
    counts, balls = np.zeros((tiles, 2), np.int64), np.zeros((tiles, 4))
    color, key = np.zeros((height, width, 5)), np.zeros((height, width), np.int64)  # 3, the grain, brightness
    points, hits = np.zeros((TILE * TILE, 3)), np.zeros((TILE * TILE, 2), np.int64)
    for k in range(tiles):
        left, top = k % across * TILE, k // across * TILE
        box = (left, min(left + TILE, width), top, min(top + TILE, height))
        counts[k, 0] = cast_tile(geoms, view, box, seen[k], points, hits, flow, ids, depth)
        counts[k, 1] = shade_tile(geoms, view, box, shading[k], balls[k], points, hits, color, key)
    every = np.arange(1, len(geoms))  # all but the floor
    for y in range(height):
        for x in range(width):
            red, green, blue = color[y, x, 0], color[y, x, 1], color[y, x, 2]
            around = look_around(key, color, y, x)
            if around == PATTERN:
                red, green, blue = mean_of_floor(geoms, view, y, x, size, color[y, x, 4])
            elif around == EDGE:
                k = y // TILE * across + x // TILE
                red, green, blue = mean_of_four(
                    geoms, view, y, x, size, seen[k], counts[k, 0], shading[k], counts[k, 1], balls[k], every
                )
            rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2] = to_byte(red), to_byte(green), to_byte(blue)
