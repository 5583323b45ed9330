"""clips/traffic.py: who goes first, by geometry of its own; bodies that never overlap; IDM against its closed form."""

import copy
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from clips.traffic import (
    CAR,
    CASES,
    CLOSED,
    HARDEST,
    LANE,
    NEAR,
    PACE,
    PATIENCE,
    POLITENESS,
    SIDEWAYS,
    WALKER,
    Temper,
    User,
    arrival,
    at,
    draw,
    drive,
    idm,
    in_order,
    on_road,
    step,
    twin,
)

DECIDED = [name for name in CASES if name != "follow"]
DT = 0.1


def case_of(name, seed):
    return draw(np.random.default_rng([seed, sorted(CASES).index(name)]), name)


def body(pose, manner, room=0.0):
    """Corners of an oriented rectangle, [4, 2]."""
    s, d, turn = pose
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    local = signs * (np.array([manner.length, manner.width]) / 2 + room)
    return local @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]) + (s, d)


def overlap(a, b):
    """Separating axes of two convex shapes; first of all the two of the picture."""
    if (a.max(0) < b.min(0)).any() or (b.max(0) < a.min(0)).any():
        return False
    for shape in (a, b):
        for edge in np.roll(shape, -1, axis=0) - shape:
            normal = np.array([-edge[1], edge[0]])
            if (a @ normal).max() < (b @ normal).min() or (b @ normal).max() < (a @ normal).min():
                return False
    return True


def rectangle(zone):
    (s0, d0), (s1, d1) = zone.low, zone.high
    return np.array([[s0, d0], [s1, d0], [s1, d1], [s0, d1]])


def who_passes_first(case, told):
    """0 or 1, by what is seen of the poses alone."""
    poses = drive(case, told, 16, DT).poses
    if case.zone:
        inside = [[overlap(body(poses[t, k], case.users[k].manner), rectangle(case.zone)) for t in range(17)]
                  for k in (0, 1)]  # fmt: skip
        times = [row.index(True) if True in row else 99 for row in inside]
        assert times[0] != times[1]
        return int(times[1] < times[0])
    (ego, lane, _), (other, aside, _) = poses[-1, :2]
    if other - ego > CAR.length:  # on its way into the ego car's lane
        assert abs(aside - lane) < LANE - 0.1
        return 1
    assert aside == case.users[1].lane or other < ego  # it waits beside the ego car, or comes in behind
    return 0


def test_overlap_knows_turned_boxes():
    square = body((0, 0, 0), CAR)
    assert overlap(square, body((4.1, 0, 0), CAR)) and not overlap(square, body((4.3, 0, 0), CAR))
    assert overlap(square, body((0, 2.9, math.pi / 2), CAR)) and not overlap(square, body((0, 3.1, math.pi / 2), CAR))
    assert not overlap(square, body((3.2, 2.0, -math.pi / 4), CAR))  # the boxes around them meet


@pytest.mark.parametrize("name", DECIDED)
@pytest.mark.parametrize("seed", range(20))
def test_another_ego_motion_reverses_the_order_of_passing(name, seed):
    case = case_of(name, seed)
    first, second = (drive(case, in_order({"ego": 0, "order": order}), 16, DT) for order in ("first", "second"))
    assert (first.order, second.order) == ([0, 1], [1, 0])
    assert [who_passes_first(case, {"ego": ego}) for ego in (1, -1)] == [0, 1]
    assert (first.poses[0] == second.poses[0]).all()  # the same first frame
    assert np.abs(first.poses[-1, 1, :2] - second.poses[-1, 1, :2]).max() > 0.5  # and another end for the other


@pytest.mark.parametrize("name", ["crossing", "narrow", "walk"])
def test_who_waited_goes_on_when_the_first_is_out(name):
    for seed in range(20):
        case = case_of(name, seed)
        for ego in (-1, 1):
            poses = drive(case, {"ego": ego}, 250, DT).poses
            for k, user in enumerate(case.users[:2]):
                shapes = [overlap(body(pose[k], user.manner), rectangle(case.zone)) for pose in poses]
                assert any(shapes) and not shapes[-1], (seed, ego, k)  # in, and out again


WISHES = [{"ego": ego} for ego in (-1, 0, 1)] + [{"lead_speed": -1}, {"lead_speed": 1, "ego": -1}]
LANES = [{"ego_lane": -1}, {"ego_lane": 1, "ego": 1}, {"lead_lane": -1, "ego": 1}, {"lead_lane": 1, "lead_speed": -1}]


def wishes_of(case):
    """Those that the case has the lanes for."""
    have = [told for told in LANES if case.name == "follow"]
    return WISHES + have


@pytest.mark.parametrize("name", CASES)
def test_bodies_never_overlap(name):
    for seed in range(20):
        case = case_of(name, seed)
        for told in [*wishes_of(case), case.told]:
            poses = drive(case, told, 50, DT).poses
            for t, row in enumerate(poses):
                shapes = [body(pose, user.manner, 0.05) for pose, user in zip(row, case.users, strict=True)]
                for a, b in combinations(range(len(shapes)), 2):
                    assert not overlap(shapes[a], shapes[b]), (seed, told, t, a, b)


def test_nobody_on_foot_is_driven_over():
    """The car stops before them, with room, whatever it wishes."""
    waited = 0
    for seed in range(40):
        case = case_of("walk", seed)
        for ego in (-1, 0, 1):
            drove = drive(case, {"ego": ego}, 60, DT)
            for row in drove.poses:
                assert not overlap(body(row[0], CAR, 0.25), body(row[1], WALKER, 0.25)), (seed, ego)
            waited += drove.order == [1, 0] and drove.speeds[:, 0].min() < 3
            assert drove.poses[-1, 0, 0] > case.users[1].place[0]  # and it goes on when they are across
    assert waited >= 40


@pytest.mark.parametrize("name", CASES)
def test_speeds_and_accelerations_are_those_of_the_rules(name):
    for seed in range(20):
        case = case_of(name, seed)
        for told in wishes_of(case):
            drove = drive(case, told, 30, DT)
            pull = np.diff(drove.speeds, axis=0) / DT
            start = np.array([user.manner.start for user in case.users])
            assert (drove.speeds >= 0).all() and (pull >= -HARDEST - 1e-9).all() and (pull <= start + 1e-9).all()
            most = np.maximum([1.5 * user.free for user in case.users], drove.speeds[0])
            assert (drove.speeds <= most + 1e-9).all()
            aside = np.diff(drove.poses[:, :, 1], axis=0) / DT * [user.axis == 0 for user in case.users]
            assert np.abs(np.diff(aside, axis=0)[np.abs(pull[1:]) < 1]).max(initial=0) <= SIDEWAYS * DT + 0.35 * DT
            steps = np.diff(drove.poses[:, :, :2], axis=0)
            way = np.linalg.norm(steps, axis=-1)
            assert (way <= np.hypot(1, 0.36) * drove.speeds.max(axis=0) * DT + 1e-9).all()


def lone(speed, wish):
    users = [User(at(0, 0), speed, wish), User(at(1e6, 50), 0.0, 0.0, lane=50.0)]
    speeds = []
    for _ in range(400):
        step(users, None, DT)
        speeds.append(users[0].speed)
    return np.array(speeds)


@pytest.mark.parametrize("speed", [0.0, 5.0, 14.0])
def test_a_car_alone_comes_to_its_wished_speed(speed):
    speeds = lone(speed, 9.0)
    assert abs(speeds[-1] - 9) < 0.01
    assert (np.diff(speeds) * (9 - speed) >= -1e-9).all()  # and never turns back


@pytest.mark.parametrize("speed", [2.0, 5.0, 7.0])
def test_the_gap_at_rest_in_the_flow_is_idms_closed_form(speed):
    """(jam + v T) / sqrt(1 - (v / wish)^4), as a root of the rule, and as where a queue ends."""
    wish = 9.0
    expected = (CAR.jam + speed * CAR.headway) / math.sqrt(1 - (speed / wish) ** 4)
    me = User(at(0, 0), speed, wish)
    assert idm(me, expected, 0.0) == pytest.approx(0, abs=1e-9)
    assert idm(me, expected + 0.1, 0.0) > 0 > idm(me, expected - 0.1, 0.0)
    users = [User(at(0, 0), 4.0, wish), User(at(30, 0), speed, speed)]
    for _ in range(2000):
        step(users, None, DT)
    assert users[1].place[0] - users[0].place[0] - CAR.length == pytest.approx(expected, abs=0.05)


def test_arrival_is_when_the_way_is_done():
    for speed, pull in ((5, 0), (5, 2), (0, 1.5), (6, -1)):
        seconds = arrival(12, speed, pull)
        assert speed * seconds + pull / 2 * seconds**2 == pytest.approx(12)
    assert arrival(12, 4, -1) == math.inf and arrival(3, 0, 0) == math.inf and arrival(-1, 5, 0) == 0


def test_the_arrow_of_a_lead_car_says_where_it_goes():
    """And what it does in the first step shows it."""
    for seed in range(20):
        case = case_of("follow", seed)
        s = [drive(case, {"lead_speed": k}, 16, DT).poses[-1, 1, 0] for k in (-1, 0, 1)]
        assert s[1] - s[0] > 1 and s[2] - s[1] > 1, seed
        d = [drive(case, {"lead_lane": k}, 16, DT).poses[-1, 1, 1] for k in (-1, 0, 1)]
        assert d[0] < -0.8 and d[1] == 0 and d[2] > 0.8, seed
        first = {(k, n): drive(case, {n: k}, 1, DT).poses[1, 1] for k in (-1, 1) for n in ("lead_speed", "lead_lane")}
        way = [first[k, "lead_speed"][0] - case.users[1].place[0] for k in (-1, 1)]
        assert way[1] > 1.5 * way[0] > 0, seed
        assert first[1, "lead_lane"][1] > 0.05 and first[-1, "lead_lane"][1] < -0.05, seed
        ego = [drive(case, {"ego_lane": k}, 16, DT).poses[-1, 0, 1] for k in (-1, 0, 1)]
        assert ego[0] < -0.5 and ego[1] == 0 and ego[2] > 0.5, seed


def test_a_lane_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="lead_lane 1: the case crossing"):
        drive(case_of("crossing", 0), {"lead_lane": 1}, 2, DT)


def test_cut_ins_come_from_both_sides_and_some_brake():
    for name in ("cut_in", "brake"):
        cases = [case_of(name, seed) for seed in range(12)]
        assert {np.sign(case.users[1].lane) for case in cases} == {-1, 1}
        assert {case.users[1].temper.brakes for case in cases} == {name == "brake"}
    for case in cases:
        calm = replace(case, users=copy.deepcopy(case.users))
        calm.users[1].temper = case.users[1].temper._replace(brakes=False)
        hard, soft = (drive(it, {"ego": -1}, 30, DT) for it in (case, calm))
        assert hard.speeds[-1, 1] < soft.speeds[-1, 1] - 1
        assert hard.speeds[-1, 0] <= soft.speeds[-1, 0] + 1e-9  # so does who drives behind it


def test_two_cut_in_from_both_sides_and_only_one_where_the_ego_car_is_faster():
    sides = set()
    for seed in range(12):
        case = case_of("double", seed)
        ego, one, two = case.users[:3]
        assert one.lane == -two.lane and abs(one.lane) == LANE and ego.lane == 0
        let, fast = (drive(case, {"ego": ego}, 16, DT).poses for ego in (-1, 1))
        assert np.abs(let[-1, 1:3, 1]).max() < LANE - 0.1 and (let[-1, 1:3, 0] > let[-1, 0, 0]).all()
        assert abs(fast[-1, 2, 1]) < LANE - 0.1 and (fast[-1, 1, 1] == one.lane or fast[-1, 1, 0] < fast[-1, 0, 0])
        assert abs(let[3, 1, 1] - one.lane) > 0 or abs(let[3, 2, 1] - two.lane) > 0
        sides.add(one.lane)
    assert sides == {-LANE, LANE}


# --------------------------------------------------------------------------- what the others wish, and nobody sees


def test_every_wish_changes_a_drive():
    """Somebody who wishes more room, or to go faster, does so; each alone."""
    case = case_of("follow", 0)
    base = case.users[1]

    def with_wish(case, **wish):
        users = copy.deepcopy(case.users)
        users[1].temper = Temper(**wish)
        return replace(case, users=users)

    ends = [drive(with_wish(case, pace=pace), {}, 16, DT).poses[-1, 1, 0] for pace in PACE]
    assert ends[1] > ends[0] + 0.2
    assert idm(replace(base, temper=Temper(headway=NEAR[0])), 8, 0) > idm(
        replace(base, temper=Temper(headway=NEAR[1])), 8, 0
    )
    crossing = [case_of("crossing", seed) for seed in range(30)]
    first = [[drive(with_wish(it, gap=gap), {"ego": 0}, 16, DT).order for it in crossing] for gap in (-1.0, 3.0)]
    assert sum(order == [1, 0] for order in first[0]) > sum(order == [1, 0] for order in first[1])
    cuts = [case_of("cut_in", seed) for seed in range(30)]
    moved = [sum(drive(with_wish(it, polite=polite), {"ego": 1}, 4, DT).poses[-1, 1, 1] != it.users[1].lane
                 for it in cuts) for polite in (0.5, 50.0)]  # fmt: skip
    assert moved[1] > moved[0]


@pytest.mark.parametrize("name", CASES)
def test_a_twin_begins_as_the_scene_with_the_same_ego_motion_and_other_wishes(name):
    own, ends = 0, []
    for seed in range(12):
        case = case_of(name, seed)
        drove = drive(case, case.told, 16, DT)
        other, again = twin(case, case.told, drove, DT, np.random.default_rng([seed, 7]))
        own += other is case
        assert (again.poses[0] == drove.poses[0]).all() and (again.speeds[0] == drove.speeds[0]).all()
        assert np.abs(again.poses[1, 1:, :2] - drove.poses[1, 1:, :2]).max() < 0.03
        assert np.abs(again.poses[-1, 0, :2] - drove.poses[-1, 0, :2]).max() < 0.03 * 16
        assert other.users[0].temper == case.users[0].temper == Temper()
        wishes = [[user.temper[:4] for user in it.users[1:]] for it in (case, other)]
        assert other is case or not np.isin(wishes[0], wishes[1]).any()
        for temper in (user.temper for user in other.users[1:]):
            for value, (low, high) in zip(temper[:4], (PACE, NEAR, POLITENESS, PATIENCE), strict=True):
                assert low <= value <= high
        ends.append(np.abs(again.poses[-1, 1:, :2] - drove.poses[-1, 1:, :2]).max())
    assert own <= 3 and max(ends) > 0.1
    same = twin(case, case.told, drove, DT, np.random.default_rng([seed, 7]))[1]
    assert (same.poses == again.poses).all()


def test_who_cuts_in_may_brake_in_a_twin_or_not():
    brakes = {name: [] for name in ("cut_in", "brake", "merge")}
    for name, found in brakes.items():
        for seed in range(12):
            case = case_of(name, seed)
            told = {"ego": 1}  # who comes in behind brakes for nobody: the ego car's motion does not tell it
            made, _ = twin(case, told, drive(case, told, 16, DT), DT, np.random.default_rng([seed, 7]))
            found.append(made.users[1].temper.brakes)
    assert set(brakes["cut_in"]) == set(brakes["brake"]) == {True, False} and set(brakes["merge"]) == {False}


def test_who_has_to_leave_a_lane_stops_at_its_end():
    for seed in range(20):
        case = case_of("merge", seed)
        other = case.users[1]
        for ego in (-1, 0, 1):
            for s, d, _ in drive(case, {"ego": ego}, 50, DT).poses[:, 1]:
                left = abs(d - other.lane) > 0.9 + 0.9  # past the barrier's side
                assert left or s + CAR.length / 2 < other.ends + CLOSED, (seed, ego)


def test_the_same_seed_is_the_same_traffic():
    for name in CASES:
        a, b = (drive(case_of(name, 3), {"ego": 1}, 20, DT) for _ in range(2))
        assert (a.poses == b.poses).all() and (a.speeds == b.speeds).all() and a.order == b.order
        assert (drive(case_of(name, 4), {}, 0, DT).poses.shape != a.poses[:1].shape) or (
            drive(case_of(name, 4), {}, 0, DT).poses != a.poses[:1]
        ).any()
        case = case_of(name, 3)
        drive(case, {"ego": -1}, 20, DT)
        assert (drive(case, {"ego": 1}, 20, DT).poses == a.poses).all()  # a drive leaves the case as it was


@pytest.mark.parametrize("curvature", [0.0, 0.02, -0.015])
def test_the_road_bends_as_told(curvature):
    s = np.linspace(0, 40, 4001)
    x, y = (np.concatenate([[0], np.cumsum(f(curvature * (s[:-1] + 0.005)) * 0.01)]) for f in (np.cos, np.sin))
    world = on_road(np.stack([s, 0 * s, 0 * s], -1), curvature)
    np.testing.assert_allclose(world, np.stack([x, y, curvature * s], -1), atol=1e-4)
    left = on_road(np.array([20.0, 3.0, 0.1]), curvature) - world[2000]
    np.testing.assert_allclose(left, [-3 * np.sin(20 * curvature), 3 * np.cos(20 * curvature), 0.1], atol=1e-9)
