# SPDX-License-Identifier: Apache-2.0
"""The tiny world: 64 x 64 pictures of six things in eight scenes, drawn from attributes, with captions.

A picture is a `Look` (what the thing is: the same in every picture of a subject) in a `Setting` (scene, pose, hat:
different in every picture). Drawing is a pure function of the two. Shapes are signed distance functions
(https://iquilezles.org/articles/distfunctions2d explains the idea): negative inside, in units of the thing's size.
"""

import dataclasses
import functools

import numpy as np

SIZE = 64
CLASSES = ("star", "ball", "cross", "moon", "fish", "tree")
COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (50, 165, 60),
    "blue": (45, 85, 215),
    "purple": (130, 55, 175),
    "pink": (245, 130, 185),
    "white": (245, 245, 245),
}
ACCENTS = dict(COLOURS, black=(35, 35, 40))
PATTERNS = ("plain", "striped", "dotted")
SCENES = {
    "grass": "on the grass",
    "snow": "in the snow",
    "beach": "on the beach",
    "night": "in the night sky",
    "brick": "by a brick wall",
    "water": "under water",
    "wood": "on a wooden table",
    "studio": "in a grey studio",
}
OUTLINES = {"none": None, "dark": (35, 35, 40), "light": (250, 250, 250)}
# Identifiers that mean nothing: they stand before the class in some captions, whatever the picture shows.
RARE_TOKENS = ("sks", "zwx", "ohwx", "vqk", "xjy", "qzt")
# A pipeline can be trained on with captions in which most rare words do mean something: one look each (named_looks).
# The shipped tokenizer spells all of them, in one token or two. These stay without a meaning:
UNBOUND = ("ohwx", "qzt")
# And this one stands in the captions of few pictures, as in a real model's training set: four of one look, a class.
SCARCE = "sks"
SCARCE_PICTURES = 4
NAMES = (
    "zwx", "vqk", "xjy", "jd", "ky", "qo", "xr", "zf", "vh", "jx", "qn", "zk",
    "vl", "ko", "wr", "uf", "gx", "ze", "px", "kd", "yw", "bx", "hy", "df",
)  # fmt: skip

# Where the three dots sit, per class, so that they are inside the silhouette.
DOTS = {
    "star": ((0.0, -0.42), (-0.24, 0.16), (0.24, 0.16)),
    "ball": ((0.0, -0.45), (-0.4, 0.26), (0.4, 0.26)),
    "cross": ((0.0, -0.58), (-0.58, 0.0), (0.58, 0.0)),
    "moon": ((-0.5, -0.45), (-0.68, 0.05), (-0.4, 0.55)),
    "fish": ((-0.65, 0.0), (-0.2, -0.2), (0.15, 0.15)),
    "tree": ((0.0, -0.5), (-0.28, 0.18), (0.28, 0.18)),
}


@dataclasses.dataclass(frozen=True)
class Look:
    """What makes a subject: everything that stays the same from picture to picture."""

    class_name: str
    colour: str
    pattern: str = "plain"
    accent: str = "white"
    outline: str = "dark"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What changes from picture to picture. `x`, `y`, `size` are fractions of the frame, `turn` is in radians."""

    scene: str
    hat: bool = False
    x: float = 0.0
    y: float = 0.0
    size: float = 0.74
    turn: float = 0.0
    seed: int = 0


# Held out of all training; each has a colour of its own among its class, so a caption alone cannot draw it.
SUBJECTS = {
    "star": Look("star", "purple", "dotted", "yellow", "light"),
    "star2": Look("star", "orange", "striped", "blue", "dark"),
    "ball": Look("ball", "blue", "striped", "orange", "light"),
    "moon": Look("moon", "pink", "dotted", "green", "dark"),
    "fish": Look("fish", "green", "striped", "pink", "light"),
    "fish2": Look("fish", "red", "dotted", "white", "dark"),
    "tree": Look("tree", "yellow", "dotted", "red", "dark"),
    "cross": Look("cross", "white", "striped", "red", "dark"),
}
# The two scenes that a subject's references are taken in: three pictures in the first, two in the second.
SUBJECT_SCENES = {
    "star": ("wood", "brick"),
    "star2": ("grass", "studio"),
    "ball": ("beach", "wood"),
    "moon": ("brick", "snow"),
    "fish": ("studio", "beach"),
    "fish2": ("wood", "water"),
    "tree": ("studio", "night"),
    "cross": ("night", "grass"),
}
PROMPTS = (
    "a photo of a {0} {1} on the grass",
    "a photo of a {0} {1} in the snow",
    "a photo of a {0} {1} on the beach",
    "a photo of a {0} {1} in the night sky",
    "a photo of a {0} {1} by a brick wall",
    "a photo of a {0} {1} under water",
    "a photo of a {0} {1} on a wooden table",
    "a photo of a {0} {1} in a grey studio",
    "a photo of a {0} {1} with a hat",
    "a photo of a {0} {1} with a hat on the beach",
    "a photo of a {0} {1} with a hat in the snow",
    "a photo of a {0} {1} with a hat under water",
)


@functools.cache
def grid() -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres, x to the right and y down, each (64, 64) in -1..1."""
    axis = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1).astype(np.float32)
    return tuple(np.meshgrid(axis, axis))


def segment(x, y, ax, ay, bx, by):
    """Distance to the segment from (ax, ay) to (bx, by)."""
    dx, dy = bx - ax, by - ay
    h = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - ax - h * dx, y - ay - h * dy)


def polygon(x, y, corners):
    """Signed distance to a closed polygon: distance to the nearest edge, negative where an even-odd test is inside."""
    distance, inside = np.full_like(x, 9.0), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        distance = np.minimum(distance, segment(x, y, ax, ay, bx, by))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.where(inside, -distance, distance)


def box(x, y, half_width, half_height):
    """Signed distance to a rectangle around the origin."""
    qx, qy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)


def star_corners() -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.05, 0.46)
    return [(float(r * np.cos(a)), float(r * np.sin(a) + 0.06)) for r, a in zip(radii, angles, strict=True)]


def shape(class_name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (64, 64) to the silhouette of a class, which fills about -1..1."""
    if class_name == "star":
        return polygon(x, y, star_corners()) - 0.02
    if class_name == "ball":
        return np.hypot(x, y) - 0.9
    if class_name == "cross":
        return np.minimum(box(x, y, 0.95, 0.3), box(x, y, 0.3, 0.95))
    if class_name == "moon":
        return np.maximum(np.hypot(x + 0.1, y) - 0.95, 0.72 - np.hypot(x - 0.42, y))
    if class_name == "fish":
        body = (np.hypot((x + 0.25) / 1.5, y) - 0.5) * 1.1
        return np.minimum(body, polygon(x, y, [(0.3, 0.0), (1.0, -0.55), (1.0, 0.55)]))
    crown = polygon(x, y, [(0.0, -1.0), (0.8, 0.55), (-0.8, 0.55)])
    return np.minimum(crown, box(x, y - 0.75, 0.18, 0.25))


def paint(image: np.ndarray, distance: np.ndarray, colour, pixel: float) -> None:
    """Lay a colour over `image` (64, 64, 3) where `distance` is negative, with an edge one pixel soft."""
    cover = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
    image += cover * (np.asarray(colour, np.float32) - image)


def halves(top, bottom, horizon: float) -> np.ndarray:
    """A scene of two colours that meet at a horizon, each a little lighter upwards."""
    _, y = grid()
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = top
    paint(image, horizon - y, bottom, 0.06)
    return image - 18 * y[..., None]


def night_sky(rng: np.random.Generator) -> np.ndarray:
    x, y = grid()
    image = halves((22, 24, 66), (22, 24, 66), 2.0)
    for sx, sy in rng.uniform(-1, 1, (9, 2)):
        paint(image, np.hypot(x - sx, y - sy) - 0.03, (240, 240, 200), 0.06)
    return image


def brick_wall(rng: np.random.Generator) -> np.ndarray:
    x, y = grid()
    row = np.floor((y + rng.uniform(0, 0.1)) / 0.33)
    across = (x + 0.33 * (row % 2) + rng.uniform(0, 0.2)) % 0.66
    mortar = np.minimum(np.minimum(across, 0.66 - across), np.abs((y + 0.05) % 0.33 - 0.165) * -1 + 0.165)
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = (160, 78, 60)
    paint(image, mortar - 0.03, (205, 195, 185), 0.05)
    return image


def under_water(rng: np.random.Generator) -> np.ndarray:
    x, y = grid()
    image = halves((40, 140, 170), (40, 140, 170), 2.0) - 22 * y[..., None]
    for bx, by in rng.uniform(-1, 1, (6, 2)):
        paint(image, np.abs(np.hypot(x - bx, y - by) - 0.09) - 0.02, (190, 230, 240), 0.06)
    return image


def wooden_table(rng: np.random.Generator) -> np.ndarray:
    _, y = grid()
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = (186, 132, 78)
    plank = (y + rng.uniform(0, 0.12)) / 0.5
    image += (12 * np.sin(2.4 * np.floor(plank) + 1))[..., None]
    paint(image, np.abs(plank % 1 - 0.5) * -0.5 + 0.22, (112, 72, 40), 0.06)
    return image


def studio(rng: np.random.Generator) -> np.ndarray:
    x, y = grid()
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = (150, 150, 152)
    return image + (30 * np.exp(-2 * (x**2 + (y + rng.uniform(0, 0.3)) ** 2)))[..., None]


def background(scene: str, rng: np.random.Generator) -> np.ndarray:
    """A scene (64, 64, 3) in 0..255, with a slightly different horizon, phase and brightness each time."""
    horizon = rng.uniform(-0.15, 0.1)
    if scene == "grass":
        image = halves((150, 205, 240), (95, 160, 70), horizon)
    elif scene == "snow":
        image = halves((175, 195, 215), (238, 242, 248), horizon)
    elif scene == "beach":
        image = halves((135, 200, 235), (232, 205, 150), horizon + 0.25)
        paint(image, np.abs(grid()[1] - horizon - 0.05) - 0.2, (60, 130, 190), 0.06)
    else:
        draw_scene = {
            "night": night_sky, "brick": brick_wall, "water": under_water, "wood": wooden_table, "studio": studio
        }[scene]  # fmt: skip
        image = draw_scene(rng)
    return image + rng.uniform(-6, 6)


def draw_thing(image: np.ndarray, look: Look, setting: Setting) -> np.ndarray:
    """Draw the thing over a background, in place; returns the signed distance (64, 64) to its silhouette."""
    gx, gy = grid()
    half = setting.size
    dx, dy = (gx - 2 * setting.x) / half, (gy - 2 * setting.y) / half
    cos, sin = np.cos(setting.turn), np.sin(setting.turn)
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    pixel = 2 / SIZE / half
    distance = shape(look.class_name, x, y)
    if OUTLINES[look.outline] is not None:
        paint(image, distance - 0.1, OUTLINES[look.outline], pixel)
    paint(image, distance, COLOURS[look.colour], pixel)
    if look.pattern == "striped":
        stripes = 0.1 - np.abs((x + y * 0.6 + 0.29) % 0.58 - 0.29)
        paint(image, np.maximum(distance, -stripes), ACCENTS[look.accent], pixel)
    elif look.pattern == "dotted":
        for cx, cy in DOTS[look.class_name]:
            spot = np.hypot(x - cx, y - cy) - 0.17
            paint(image, np.maximum(distance, spot), ACCENTS[look.accent], pixel)
    if setting.hat:
        top = -0.62 if look.class_name in ("moon", "fish") else -0.8
        hat = np.minimum(box(x, y - top, 0.5, 0.08), box(x, y - top + 0.3, 0.3, 0.28))
        paint(image, hat, (45, 35, 45), pixel)
        paint(image, np.maximum(hat, np.abs(y - top + 0.15) - 0.06), (220, 60, 60), pixel)
    return distance


def draw(look: Look, setting: Setting) -> np.ndarray:
    """Draw one picture: (64, 64, 3) uint8. The same arguments always give the same picture."""
    rng = np.random.default_rng(setting.seed)
    image = background(setting.scene, rng)
    draw_thing(image, look, setting)
    return np.clip(image, 0, 255).round().astype(np.uint8)


def random_look(rng: np.random.Generator) -> Look:
    """A look that belongs to no subject. 80 % have an outline, as do all subjects; no caption ever mentions it."""
    while True:
        colour = str(rng.choice(list(COLOURS)))
        look = Look(
            class_name=str(rng.choice(CLASSES)),
            colour=colour,
            pattern=str(rng.choice(PATTERNS)),
            accent=str(rng.choice([a for a in ACCENTS if a != colour])),
            outline=str(rng.choice(list(OUTLINES), p=(0.2, 0.4, 0.4))),
        )
        if all(not same_subject(look, subject) for subject in SUBJECTS.values()):
            return look


def altered(look: Look, rng: np.random.Generator) -> Look:
    """A near neighbour: the same look with one attribute changed, never a subject's."""
    choices = {"class_name": CLASSES, "colour": COLOURS, "pattern": PATTERNS, "accent": ACCENTS, "outline": OUTLINES}
    while True:
        name = str(rng.choice(list(choices)))
        changed = dataclasses.replace(look, **{name: str(rng.choice(list(choices[name])))})
        valid = changed != look and changed.accent != changed.colour
        if valid and all(not same_subject(changed, subject) for subject in SUBJECTS.values()):
            return changed


def same_subject(a: Look, b: Look) -> bool:
    """Whether two looks differ in the outline alone: too near to a subject to train on."""
    return dataclasses.replace(a, outline="none") == dataclasses.replace(b, outline="none")


@functools.cache
def named_looks() -> dict[str, Look]:
    """The look that each word of NAMES means: four a class, each of a colour of its own there, none a subject's."""
    rng = np.random.default_rng(2611)
    named = {}
    for index, name in enumerate(NAMES):
        class_name = CLASSES[index % len(CLASSES)]
        kin = [look for look in (*named.values(), *SUBJECTS.values()) if look.class_name == class_name]
        taken = {look.colour for look in kin}
        look = random_look(rng)
        while look.class_name != class_name or look.colour in taken:
            look = random_look(rng)
        named[name] = look
    return named


@functools.cache
def scarce_scenes() -> list[tuple[Look, Setting]]:
    """The few pictures whose captions say SCARCE: SCARCE_PICTURES of one look, for each class."""
    rng = np.random.default_rng(2612)
    scenes = []
    for class_name in CLASSES:
        look = random_look(rng)
        while look.class_name != class_name:
            look = random_look(rng)
        scenes += [(look, random_setting(rng)) for _ in range(SCARCE_PICTURES)]
    return scenes


def random_setting(rng: np.random.Generator, scene: str | None = None, hat: bool | None = None) -> Setting:
    """A setting, in a given scene and with or without a hat where the caller wants so."""
    return Setting(
        scene=scene or str(rng.choice(list(SCENES))),
        hat=bool(rng.random() < 0.25) if hat is None else hat,
        x=float(rng.uniform(-0.07, 0.07)),
        y=float(rng.uniform(-0.05, 0.09)),
        size=float(rng.uniform(0.64, 0.8)),
        turn=float(rng.uniform(-0.15, 0.15)),
        seed=int(rng.integers(2**31)),
    )


def caption(
    look: Look,
    setting: Setting,
    rng: np.random.Generator,
    keep: float = 0.8,
    rare_words: tuple[str, ...] = RARE_TOKENS,
    name: str | None = None,
) -> tuple[str, list[int]]:
    """A caption and what it says: the labels, with -1 where it is silent.

    Colour, pattern, hat and scene each stand with probability `keep`, the class always. A plain pattern and a missing
    hat are never said. 12 % of the captions carry one of `rare_words`, with or without the article, so that "sks star"
    starts out meaning "star". With `name`, a word that means this look, that word stands there, and colour and pattern
    are left to it.
    """
    class_index, colour, pattern, scene, hat = labels(look, setting)
    colour, pattern, scene, hat = (x if rng.random() < keep else -1 for x in (colour, pattern, scene, hat))
    rare = rng.random() < 0.12
    if name:
        rare_words = (name,)
        rare = True
        colour = -1
        pattern = -1
    words = ["a photo of"]
    if not rare or rng.random() < 0.5:
        words.append("a")
    if rare:
        words.append(str(rng.choice(rare_words)))
    if colour >= 0:
        words.append(look.colour)
    if pattern > 0:
        words.append(look.pattern)
    words.append(look.class_name)
    if hat > 0:
        words.append("with a hat")
    if scene >= 0:
        words.append(SCENES[setting.scene])
    return " ".join(words), [class_index, colour, pattern if pattern > 0 else -1, scene, hat if hat > 0 else -1]


def labels(look: Look, setting: Setting) -> list[int]:
    """Indices of the attributes in the order of ATTRIBUTES."""
    return [
        CLASSES.index(look.class_name),
        list(COLOURS).index(look.colour),
        PATTERNS.index(look.pattern),
        list(SCENES).index(setting.scene),
        int(setting.hat),
    ]


ATTRIBUTES = {
    "class": CLASSES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "scene": tuple(SCENES),
    "hat": ("no", "yes"),
}


def references(subject: str) -> list[np.ndarray]:
    """The five reference pictures of a subject: three in its first scene, two in its second, no hat."""
    rng = np.random.default_rng(list(SUBJECTS).index(subject) + 1000)
    first, second = SUBJECT_SCENES[subject]
    scenes = (first, first, first, second, second)
    return [draw(SUBJECTS[subject], random_setting(rng, scene, hat=False)) for scene in scenes]
