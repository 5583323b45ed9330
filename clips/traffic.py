"""Traffic that answers to the ego car, in road coordinates: s metres along the road, d metres to its left.

Three rules:
    follow   the Intelligent Driver Model (Treiber, Hennecke, Helbing 2000, Phys. Rev. E 62, 1805): `idm`
    change   into a lane where nobody has to brake hard for it (the safety criterion of MOBIL: Kesting, Treiber, Helbing
             2007, Transp. Res. Rec. 1999, 86): `may_change`
    give way where two paths meet, the other goes first if it is out before the ego car comes, with a gap to spare
             of its own (gap acceptance: Treiber, Kesting 2013, Traffic Flow Dynamics); else it waits: `Zone.decide`
Who may not go yet brakes for the line as for a car that stands there, so the ego car gives way by the first rule.

User 0 is the ego car, user 1 the other one that a case is about. Drivers are in a hurry: a clip lasts 1.6 s. What the
others wish (`Temper`) no picture shows: a twin is the same scene with wishes drawn anew.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

LANE = 3.2  # metres
HARDEST = 8.0  # m/s2, of brakes
POLITE = 4.0  # m/s2, that a change of lanes may cost
SIDEWAYS = 4.0  # m/s2, of a car that steers
SWING = 3.0  # 1/s: how fast it comes to its lane
STEEPEST = 0.35  # metres to the side a metre
ROOM = 0.2  # metres to both sides of a body
GAP = 0.4  # seconds
CLOSED = 7.0  # metres that a car needs to leave its lane
SLOWER, FASTER = 0.35, 1.5  # of the wished speed
AT_ONCE = {-1: 0.6, 0: 1.0, 1: 1.3}  # of its speed, that a lead car which is told so drives from the first frame on
SLIP = 1.2  # m/s to the side, of a lead car that is told to leave its lane: the same
PACE, NEAR = (0.9, 1.25), (0.7, 1.3)  # of the usual wished speed and headway: between these, people differ
POLITENESS, PATIENCE = (2.5, 5.5), (0.2, 0.6)  # as POLITE and GAP
BRAKING = 0.5  # share of the cars that brake, of those that cut in alone
KNOWN = 0.03  # metres, or radians that the ego car has turned: who knows what is told of a clip knows that much
TWINS = 100  # draws of wishes
HORIZON, TIME_STEP = 16, 0.1  # frames and seconds, in which a case must be decided
COURSES = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], float)  # quarter turns to the left of the ego car's
OVERRIDES = {
    "ego": (-1, 0, 1), "ego_lane": (-1, 0, 1), "lead_speed": (-1, 0, 1), "lead_lane": (-1, 0, 1),
    "order": ("first", "second"),
}  # fmt: skip


class Manner(NamedTuple):
    """What IDM knows of a kind of road user. Metres and seconds."""

    length: float
    width: float
    start: float  # m/s2, at most
    brake: float  # m/s2, without need
    headway: float
    jam: float  # metres between bumpers in a queue


class Temper(NamedTuple):
    """What somebody on the road wishes, and nobody sees."""

    pace: float = 1.0  # of the usual wished speed
    headway: float = 1.0  # of the usual
    polite: float = POLITE  # m/s2
    gap: float = GAP  # seconds
    brakes: bool = False  # once it has changed its lane


CAR, WALKER = Manner(4.2, 1.8, 2.5, 3.0, 1.0, 1.5), Manner(0.5, 0.5, 2.5, 4.0, 0.3, 0.3)


@dataclass
class User:
    """Somebody on the road."""

    place: np.ndarray  # (s, d) of its middle
    speed: float  # m/s along its course
    wish: float  # m/s on a free road, usually; 0 = parked
    course: int = 0
    lane: float = 0.0  # d that it steers for, on courses 0 and 2
    wants: float | None = None  # d of the lane that it will change to when that is safe
    ends: float = math.inf  # s of the line where it waits for a gap, CLOSED metres before its lane ends
    manner: Manner = CAR
    temper: Temper = Temper()
    slip: float = 0.0  # m/s to its left

    @property
    def free(self) -> float:
        """m/s on a free road."""
        return self.wish * self.temper.pace

    @property
    def axis(self) -> int:
        """0 on the road, 1 across it."""
        return self.course % 2

    @property
    def forth(self) -> float:
        """How far it has come on its course."""
        return float(COURSES[self.course] @ self.place)

    @property
    def target(self) -> float:
        """Coordinate across its course that it steers for."""
        return self.lane if self.axis == 0 else float(self.place[0])

    def extent(self, axis: int) -> float:
        """Half its size along s (0) or d (1)."""
        return (self.manner.length if axis == self.axis else self.manner.width) / 2

    def move(self, pull: float, dt: float) -> None:
        before, self.speed = self.speed, max(0.0, self.speed + pull * dt)
        if self.axis == 0:
            left = COURSES[(self.course + 1) % 4]
            aside = SWING**2 * (self.lane - self.place[1]) * left[1] - 2 * SWING * self.slip
            slip = self.slip + np.clip(aside, -SIDEWAYS, SIDEWAYS) * dt
            self.slip = float(np.clip(slip, -STEEPEST * self.speed, STEEPEST * self.speed))
            self.place = self.place + left * self.slip * dt
        self.place = self.place + COURSES[self.course] * (before + self.speed) / 2 * dt


# ------------------------------------------------------------------------------------------------------------ the rules


def idm(me: User, gap: float, closing: float, manner: Manner | None = None) -> float:
    """m/s2 of somebody with `gap` metres (inf: a free road) to who is ahead, to whom it closes up at `closing` m/s."""
    m = manner or me.manner
    free = m.start * (1 - (me.speed / me.free) ** 4) if me.wish else -m.brake
    wanted = m.jam + max(
        0.0, me.speed * m.headway * me.temper.headway + me.speed * closing / (2 * math.sqrt(m.start * m.brake))
    )
    return max(-HARDEST, max(free, -m.brake) - m.start * (wanted / max(gap, 0.1)) ** 2)


def way_to(me: User, other: User) -> float:
    """Metres to `other` on my way; inf if it is not ahead, not in my lane, or comes towards me."""
    turned = (other.course - me.course) % 4
    ahead = float(COURSES[me.course] @ (other.place - me.place))
    side = 1 - me.axis
    ends = sorted((other.place[side], other.target)) if turned == 0 and side == 1 else [other.place[side]] * 2
    room = me.manner.width / 2 + other.extent(side) + ROOM
    if turned == 2 or ahead <= 0 or not ends[0] - room < me.target < ends[-1] + room:
        return math.inf
    return ahead - me.manner.length / 2 - other.extent(me.axis)


def follow(me: User, users: list[User]) -> float:
    """m/s2, by who is ahead and where the lane ends."""
    pulls = [idm(me, math.inf, 0.0)]
    for other in users:
        if other is not me and (way := way_to(me, other)) < math.inf:
            pulls.append(idm(me, way, me.speed - other.speed * float(COURSES[me.course] @ COURSES[other.course])))
    if me.wants is not None:
        pulls.append(stop(me, me.ends - me.forth - me.manner.length / 2))
    return min(pulls)


def stop(me: User, way: float) -> float:
    """m/s2 of somebody who stops at a line."""
    return idm(me, way, me.speed, me.manner._replace(headway=0.0, jam=0.5))


def may_change(me: User, users: list[User]) -> bool:
    """Whether neither I nor who is then behind me would have to brake hard, by my politeness, for who is in front."""
    changed = replace(me, lane=me.wants)
    for other in users:
        if other is not me and other.course == me.course:
            for back, front in ((changed, other), (other, changed)):
                way, free = way_to(back, front), idm(back, math.inf, 0.0)
                if way < math.inf and idm(back, way, back.speed - front.speed) < free - me.temper.polite:
                    return False
    return True


def arrival(way: float, speed: float, pull: float) -> float:
    """Seconds until somebody at this speed and acceleration has gone `way` metres; inf if it stops before."""
    square = speed**2 + 2 * pull * max(way, 0.0)
    if way <= 0:
        return 0.0
    return 2 * way / (speed + math.sqrt(square)) if square > 0 else math.inf


@dataclass
class Zone:
    """A rectangle of the road that only one of users 0 and 1 may be in."""

    low: np.ndarray  # (s, d)
    high: np.ndarray
    detour: tuple[float, float, float, float] | None = None  # between two s, the ego car goes at this d; home lane
    holder: int = 0
    order: list[int] = field(default_factory=list)  # of coming in

    def ways(self, user: User) -> tuple[float, float]:
        """Metres until its front is in, and until its back is out."""
        first, last = sorted(COURSES[user.course][user.axis] * np.array([self.low[user.axis], self.high[user.axis]]))
        half = user.manner.length / 2
        return first - half - user.forth, last + half - user.forth

    def decide(self, users: list[User]) -> None:
        """Who may go: who can no longer stop; the other if the gap is long enough; else the ego car."""
        (ego_in, ego_out), (other_in, other_out) = map(self.ways, users[:2])
        self.order += [k for k, way in enumerate((ego_in, other_in)) if way <= 0 and k not in self.order]
        ego, other = users[:2]
        held = users[self.holder]
        if ego_out < 0 or other_out < 0:
            self.holder = int(ego_out < 0)
        elif self.ways(held)[0] > held.speed**2 / (2 * held.manner.brake):
            out = max(other_out / other.free, arrival(other_out, other.speed, other.manner.start))
            self.holder = int(out + other.temper.gap < arrival(ego_in, ego.speed, follow(ego, users)))
        if self.detour:
            first, last, lane, home = self.detour
            ego.lane = lane if self.holder == 0 and first < ego.place[0] < last else home

    def pull(self, k: int, user: User) -> float:
        """m/s2 of user k, by who may go."""
        way = self.ways(user)[0]
        return stop(user, way) if k < 2 and k != self.holder and way > 0 else math.inf


def step(users: list[User], zone: Zone | None, dt: float) -> None:
    """Everybody decides by what they see now; then all move."""
    if zone:
        zone.decide(users)
    for me in users:
        if me.wants is not None and may_change(me, users):
            me.lane, me.wants, me.wish = me.wants, None, me.wish * (0.4 if me.temper.brakes else 1)
    pulls = [min(follow(me, users), zone.pull(k, me) if zone else math.inf) for k, me in enumerate(users)]
    for me, pull in zip(users, pulls, strict=True):
        me.move(pull, dt)


# ------------------------------------------------------------------------------------------------------------ the cases


@dataclass
class Case:
    """A situation, before the ego car's motion is told."""

    name: str
    users: list[User]
    zone: Zone | None = None
    curvature: float = 0.0  # of the road, 1/m, to the left
    lanes: tuple[float, ...] = ()  # d of those that lie side by side
    told: dict = field(default_factory=dict)  # the ego motion as drawn


@dataclass
class Drive:
    """What happened. Poses [T + 1, N, 3]: s, d, heading against the road; speeds [T + 1, N]; who passed in what order
    where the ego car (0) meets the other (1), empty where nobody has passed."""

    poses: np.ndarray
    speeds: np.ndarray
    order: list[int]


def in_order(told: dict) -> dict:
    """Wishes with an ego motion in the place of the order that it brings about."""
    order = {"first": {"ego": 1}, "second": {"ego": -1}}
    return {key: value for key, value in told.items() if key != "order"} | order.get(told.get("order"), {})


def wished(case: Case, told: dict) -> list[User]:
    """The case's users with the wishes that `told` gives them. Raises ValueError for a lane that is not there."""
    users = copy.deepcopy(case.users)
    ego, lead = users[:2]
    for user, speed, side in ((ego, "ego", "ego_lane"), (lead, "lead_speed", "lead_lane")):
        user.wish *= {-1: SLOWER, 0: 1.0, 1: FASTER}[told.get(speed, 0)]
        if user is lead:  # an arrow tells what it does now
            user.speed, user.slip = user.speed * AT_ONCE[told.get(speed, 0)], SLIP * told.get(side, 0)
        if told.get(side):
            user.wants = user.lane + LANE * told[side]
            if min((abs(user.wants - lane) for lane in case.lanes), default=1) > 0.1:
                raise ValueError(f"{side} {told[side]}: the case {case.name} has no such lane")
    return users


def drive(case: Case, told: dict, frames: int, dt: float) -> Drive:
    """The case with the ego car's wishes and the other's: some of OVERRIDES, but no order."""
    users, zone = wished(case, told), copy.deepcopy(case.zone)
    poses, speeds, order = [], [], []
    for t in range(frames + 1):
        waits = users[1].wants is not None
        if t:
            step(users, zone, dt)
        if waits and users[1].wants is None:
            order = [1, 0] if users[1].forth > users[0].forth else [0, 1]
        turns = [u.course * math.pi / 2 + math.atan2(u.slip, max(u.speed, 1e-9)) for u in users]
        poses.append([[*u.place, turn] for u, turn in zip(users, turns, strict=True)])
        speeds.append([u.speed for u in users])
    ahead = users[1].forth - users[0].forth
    if users[1].wants is not None and ahead < users[1].manner.length:  # side by side, and still not let in
        order = [0, 1]
    if zone:
        order = (zone.order + [k for k in (0, 1) if k not in zone.order]) if zone.order else []
    return Drive(np.array(poses), np.array(speeds), order)


def at(s: float, d: float) -> np.ndarray:
    return np.array([s, d], float)


def highway(rng: np.random.Generator, name: str, other: User, speed: float) -> Case:
    """Three lanes; the ego car in the middle one, up to two more cars far ahead in the others."""
    users = [User(at(0, 0), speed, speed), other]
    for side in rng.permutation([-1, 1])[: rng.integers(3)]:
        v = other.speed + rng.uniform(0, 3)
        users.append(User(at(rng.uniform(24, 32), side * LANE), v, v, lane=side * LANE))
    return Case(name, users, curvature=rng.choice([0.0, rng.uniform(-0.02, 0.02)]), lanes=(-LANE, 0.0, LANE))


def follow_case(rng: np.random.Generator) -> Case:
    """A car ahead, which may be told to speed up, brake, or leave its lane; the ego car may leave it, too."""
    v = rng.uniform(4.5, 9)
    lead = User(at(rng.uniform(8, 14), 0), v, v)
    case = highway(rng, "follow", lead, rng.uniform(3, 9))
    what, way = rng.choice([None, "lead_speed", "lead_lane"], p=[0.2, 0.4, 0.4]), int(rng.choice([-1, 1]))
    case.told = {"ego_lane": int(rng.choice([-1, 0, 0, 1]))} | ({what: way} if what else {})
    return case


def cut_in(rng: np.random.Generator) -> Case:
    """A car of the next lane comes into the ego car's, if that leaves the room."""
    speed, lane = rng.uniform(6, 9), LANE * rng.choice([-1, 1])
    slower = rng.uniform(-0.3, 1.8)
    ahead, v = 6.4 + 1.7 * slower + rng.uniform(-0.3, 0.7), speed - slower
    return highway(rng, "cut_in", User(at(ahead, lane), v, v, lane=lane, wants=0.0), speed)


def brake(rng: np.random.Generator) -> Case:
    """The same, and then it brakes."""
    case = cut_in(rng)
    case.users[1].temper = Temper(brakes=True)
    return replace(case, name="brake")


def double(rng: np.random.Generator) -> Case:
    """The same, and a second car comes in from the other side, ahead of the first."""
    case = cut_in(rng)
    one = case.users[1]
    v = one.speed + rng.uniform(2.0, 4.0)
    two = User(at(one.place[0] + rng.uniform(12, 15), -one.lane), v, v, lane=-one.lane, wants=0.0)
    away = [u for u in case.users[2:] if u.lane != two.lane]
    return replace(case, name="double", users=[*case.users[:2], two, *away])


def merge(rng: np.random.Generator) -> Case:
    """The same, and its lane ends."""
    case = cut_in(rng)
    other = case.users[1]
    other.ends = float(other.place[0] + other.speed**2 / 4 + rng.uniform(3, 6))
    away = [u for u in case.users[2:] if u.lane != other.lane]
    return replace(case, name="merge", users=[*case.users[:2], *away])


def street(speed: float, lane: float) -> User:
    return User(at(0, lane), speed, speed, lane=lane)


def crossing(rng: np.random.Generator) -> Case:
    """A car from the right or the left."""
    speed, v, course = rng.uniform(6, 8.5), rng.uniform(4, 6), int(rng.choice([1, 3]))
    where = speed**2 / 6 + 2.1 + rng.uniform(0.5, 2.5) + 1.3
    way = v**2 / 6 + rng.uniform(0.3, 1.5)
    zone = Zone(at(where - 1.3, -1.3), at(where + 1.3, 1.3))
    other = User(at(where, -COURSES[course, 1] * (1.3 + way + 2.1)), v, v + 2, course)
    return Case("crossing", [street(speed, 0.0), other], zone)


def narrow(rng: np.random.Generator) -> Case:
    """A parked car leaves the street to the ego car or to who comes towards it."""
    speed, v = rng.uniform(4.5, 6.5), rng.uniform(3.5, 6)
    parked = speed**2 / 6 + 2.1 + rng.uniform(0.5, 2) + 6 + 2.1
    zone = Zone(at(parked - 8.1, -9), at(parked + 10, 9), (parked - 10.2, parked + 3.8, 0.0, -1.3))
    other = User(at(parked + 10 + v**2 / 6 + rng.uniform(0.3, 1) + 2.1, 1.6), v, v, 2, lane=1.6)
    return Case("narrow", [street(speed, -1.3), other, User(at(parked, -2.4), 0.0, 0.0, lane=-2.4)], zone)


def walk(rng: np.random.Generator) -> Case:
    """Somebody on foot at a crossing."""
    speed, v, course = rng.uniform(5, 7.5), rng.uniform(1.4, 2.2), int(rng.choice([1, 3]))
    where = speed**2 / 6 + 2.1 + rng.uniform(0.3, 2.0) + 0.8
    zone = Zone(at(where - 0.8, -1.3), at(where + 0.8, 1.3))
    other = User(at(where, -COURSES[course, 1] * (1.55 + v**2 / 8 + rng.uniform(0.1, 0.5))), v, v, course)
    other.manner = WALKER
    return Case("walk", [street(speed, 0.0), other], zone)


CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    "follow": follow_case, "cut_in": cut_in, "brake": brake, "double": double, "merge": merge, "crossing": crossing,
    "narrow": narrow, "walk": walk,
}  # fmt: skip


def tempered(case: Case, rng: np.random.Generator, brakes: bool | None = None) -> Case:
    """The case with wishes of the others drawn anew; `brakes` None: those of the case."""
    users = copy.deepcopy(case.users)
    for user in users[1:]:
        ranges = (PACE, NEAR, POLITENESS, PATIENCE)
        will = user.temper.brakes if brakes is None or user is not users[1] else brakes
        user.temper = Temper(*(float(rng.uniform(*span)) for span in ranges), will)
    return replace(case, users=users)


def decided(case: Case) -> bool:
    """Whether the ego car's motion decides a case (but `follow`): faster, it passes first; slower, all who want to
    change their lanes have, it passes second, and the other ends 0.8 m or more from where it ended."""
    first, second = (drive(case, {"ego": ego}, HORIZON, TIME_STEP) for ego in (1, -1))
    apart = np.abs(first.poses[-1, 1, :2] - second.poses[-1, 1, :2]).max()
    changed = [abs(second.poses[-1, k, 1] - u.lane) > 0.1 for k, u in enumerate(case.users) if u.wants is not None]
    return case.name == "follow" or ((first.order, second.order) == ([0, 1], [1, 0]) and all(changed) and apart > 0.8)


def draw(rng: np.random.Generator, name: str) -> Case:
    """A case that is decided. Raises RuntimeError if a thousand scenes have none."""
    for _ in range(1000):
        case = tempered(CASES[name](rng), rng)
        case.told = {"ego": int(rng.integers(-1, 2))} | case.told
        if decided(case):
            return case
    raise RuntimeError(f"the case {name}: in a thousand scenes, the ego motion does not decide who passes first")


def twin(case: Case, told: dict, drove: Drive, dt: float, rng: np.random.Generator) -> tuple[Case, Drive]:
    """The case with other wishes of the others, and how it then goes on; `drove` is how it went.

    What is told of a clip stays true: the ego car's mean step and, of the others, the first one. (Wishes with which
    that is so are drawn until they are found, TWINS times at most: then the case is its own twin.)"""
    frames = len(drove.poses) - 1
    for _ in range(TWINS):
        other = tempered(case, rng, bool(rng.random() < BRAKING) if case.name in ("cut_in", "brake") else None)
        again = drive(other, told, frames, dt)
        apart = np.abs(again.poses - drove.poses)
        as_told = max(*apart[-1, 0, :2] / frames, apart[-1, 0, 2], apart[1, 1:, :2].max()) < KNOWN
        if as_told and decided(other):
            return other, again
    return case, drove


def on_road(poses: np.ndarray, curvature: float) -> np.ndarray:
    """Road [..., 3] (s, d, heading) -> world [..., 3] (x, y, heading); the road begins at 0, towards x."""
    s, d, turn = np.moveaxis(poses, -1, 0)
    half = curvature * s / 2
    chord = s * np.sinc(half / math.pi)
    bend = 2 * half
    return np.stack([chord * np.cos(half) - d * np.sin(bend), chord * np.sin(half) + d * np.cos(bend), turn + bend], -1)
