"""Draw the figures of docs/retinanet_explained.md from a trained detector and its dataset.

``python docs/figures/draw_explained.py MODEL ANNOTATIONS PHOTOS`` takes a model folder, annotations in
any format that focaldet reads, and the folder of the photos. It writes the figures and
``explained.json``, the numbers that the page states, and prints these numbers. The same versions of torch,
matplotlib and Pillow produce identical files.

Colours and text are chosen to be readable on white and on nearly black pages, so the drawings have no
background.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import draw_focal_loss as style
import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import batched_nms
from torchvision.transforms.functional import to_pil_image

from focaldet import RetinaNet, sigmoid_focal_loss
from focaldet.boxes import clip_boxes, scale_boxes
from focaldet.datasets import DetectionDataset, read_annotations
from focaldet.evaluation import evaluate_coco
from focaldet.heads import flatten_maps
from focaldet.matching import BACKGROUND, BETWEEN
from focaldet.visualization import class_color, draw_boxes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from focaldet import Detections
    from focaldet.structures import Target

INK = "#7b7f86"  # a contrast of 4 to 1 on white and on #131416
DARK = "#131416"
BLUE, ORANGE, GREEN, PURPLE, PINK = "#3a87c8", "#e07b28", "#22a06b", "#9a6dd7", "#d6568c"
GROUPS = (("positives", ORANGE), ("hard negatives", PURPLE), ("easy negatives", BLUE))
LOSSES = {  # alpha and gamma
    "cross_entropy": ("cross entropy", None, 0.0),
    "balanced": (f"balanced, {style.ALPHA} 0.75", 0.75, 0.0),
    "focal": (f"focal, {style.GAMMA} 2, {style.ALPHA} 0.25", 0.25, 2.0),
}
BOXES = {"YOLOv2": 845, "SSD": 8_732, "RetinaNet": 100_000}  # per image; the last one approximately
MAPS = {3: (100, 168), 4: (50, 84), 5: (25, 42), 6: (13, 21), 7: (7, 11)}  # at 800 x 1344
CHANNELS = {3: 512, 4: 1024, 5: 2048}  # of C3 to C5 of a ResNet-50
EASY = 0.1  # A background anchor is easy if all of its scores are below this.
WANTED = 0.5  # The score above which detections are drawn as final.
PANEL = (560, 420)  # width and height in pixels
GAP = 8
LARGEST_FILE = 140_000  # bytes of a sheet of photos
TIMES = "\N{MULTIPLICATION SIGN}"


class Anchors(NamedTuple):
    """What a model predicts for the anchors of some photos, and what they should have learned."""

    logits: Tensor  # [N, K]
    targets: Tensor  # [N, K], 1 for the class of a positive anchor

    @property
    def groups(self) -> list[Tensor]:
        """``[N]`` masks of the positives, the hard negatives and the easy negatives."""
        positive = self.targets.any(dim=1)
        easy = ~positive & (self.logits.sigmoid().amax(dim=1) < EASY)
        return [positive, ~positive & ~easy, easy]

    def losses(self, alpha: float | None, gamma: float) -> Tensor:
        """Return the loss of each anchor, the sum over its classes."""
        options: dict[str, Any] = {"alpha": alpha, "gamma": gamma, "reduction": "none"}
        return sigmoid_focal_loss(self.logits, self.targets, **options).sum(dim=1)


class Photo(NamedTuple):
    """One photo, with everything that the model makes of it, in pixels of the batch."""

    picture: Image.Image
    target: Target
    anchors: list[Tensor]  # [H * W * A, 4] per level
    grids: list[tuple[int, int]]
    scores: list[Tensor]  # [H * W * A, K] per level
    box_deltas: list[Tensor]  # [H * W * A, 4] per level
    matched_idxs: Tensor  # [R]
    size: tuple[int, int]  # of the resized photo
    found: Detections

    def to_panel(self, boxes: Tensor) -> Tensor:
        """Scale boxes from the batch to a panel."""
        return scale_boxes(boxes, self.size, PANEL[::-1])


def run(model: RetinaNet, dataset: DetectionDataset, index: int) -> tuple[Photo, Anchors]:
    """Run a model on a photo of a dataset and match the anchors with its objects."""
    image, target = dataset[index]
    batch = model.preprocess([image])
    output = model(batch)
    scaled = batch.scale_targets([target])[0]
    A = model.anchor_generator.num_anchors
    matched_idxs = model.criterion.assigner(scaled["boxes"], torch.cat(output.anchors))
    logits = flatten_maps(output.logits, A)[0]
    targets = torch.zeros_like(logits)
    positive = matched_idxs >= 0
    targets[positive, scaled["labels"][matched_idxs[positive]]] = 1
    learns = matched_idxs != BETWEEN
    counts = [len(level) for level in output.anchors]
    photo = Photo(
        to_pil_image(image).resize(PANEL, Image.Resampling.LANCZOS),
        scaled,
        output.anchors,
        [(level.shape[2], level.shape[3]) for level in output.logits],
        list(logits.sigmoid().split(counts)),
        list(flatten_maps(output.box_deltas, A)[0].split(counts)),
        matched_idxs,
        output.sizes[0],
        model.detections(output)[0],
    )
    return photo, Anchors(logits[learns].double(), targets[learns].double())


class Candidates(NamedTuple):
    """The predictions that are left after each step of inference."""

    above: list[int]  # per level, above the score threshold
    kept: list[int]  # per level, at most the best 1,000
    boxes: Tensor  # [N, 4] of the kept ones
    after_suppression: int
    best: Tensor  # [D, 4] of at most 100 that survive suppression


def infer(model: RetinaNet, photo: Photo) -> Candidates:
    """Repeat inference step by step. The result is that of ``model.detections``."""
    config = model.config
    above, kept, parts = [], [], []
    for anchors, scores, deltas in zip(photo.anchors, photo.scores, photo.box_deltas, strict=True):
        rows, labels = (scores > config.score_threshold).nonzero(as_tuple=True)
        best = scores[rows, labels].argsort(descending=True, stable=True)[: config.pre_nms_top_k]
        above.append(len(rows))
        kept.append(len(best))
        rows, labels = rows[best], labels[best]
        boxes = model.postprocess.box_coder.decode(deltas[rows], anchors[rows])
        parts.append((clip_boxes(boxes, photo.size), scores[rows, labels], labels))
    boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    keep = batched_nms(boxes, scores, labels, config.nms_threshold)
    return Candidates(above, kept, boxes, len(keep), boxes[keep[: config.max_detections]])


# ---------------------------------------------------------------------------------------- drawings


def save(figure: plt.Figure, folder: Path, name: str) -> None:
    """Write a drawing without a background and without a date."""
    path = folder / f"explained_{name}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def draw_box_counts(folder: Path) -> None:
    """Draw how many boxes three one-stage detectors score per image."""
    figure, axes = plt.subplots(figsize=(7.2, 1.7), layout="constrained")
    bars = axes.barh(list(BOXES), list(BOXES.values()), color=(BLUE, BLUE, ORANGE), height=0.6)
    labels = [
        f"{count:,}" if name != "RetinaNet" else "about 100,000" for name, count in BOXES.items()
    ]
    axes.bar_label(bars, labels, padding=5, color=INK)
    axes.invert_yaxis()
    axes.set(xlim=(0, 122_000), xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save(figure, folder, "boxes")


def draw_anchor_losses(anchors: Anchors, photos: int, folder: Path) -> None:
    """Draw a histogram of the anchors' cross entropy, and what the groups are of each loss."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.2, 6.2), layout="constrained", height_ratios=(3, 2)
    )
    losses = anchors.losses(None, 0.0).clamp(min=1e-3).log10()
    edges = torch.linspace(-3, 1, 61, dtype=torch.float64)
    for (name, colour), mask in zip(GROUPS, anchors.groups, strict=True):
        counts = torch.histogram(losses[mask], edges).hist / photos
        step = {"color": colour, "linewidth": 1.8}
        top.stairs(counts, 10**edges, fill=True, alpha=0.25, color=colour, label=name)
        top.stairs(counts, 10**edges, baseline=None, **step)
    top.set(xscale="log", yscale="log", xlim=(3e-3, 10), ylim=(0.01, None))
    top.set(xlabel="cross entropy of an anchor", ylabel="anchors per photo")
    top.legend(frameon=False, loc="upper right")
    rows = [("anchors", [mask.double().sum() for mask in anchors.groups])]
    for text, alpha, gamma in LOSSES.values():
        losses = anchors.losses(alpha, gamma)
        rows.append((text, [losses[mask].sum() for mask in anchors.groups]))
    for row, (_, sums) in enumerate(rows):
        left = 0.0
        total = sum(map(float, sums))
        for (_, colour), part in zip(GROUPS, sums, strict=True):
            share = 100 * float(part) / total
            bottom.barh(row, share, left=left, color=colour, height=0.66)
            if share >= 7:
                place = (left + share / 2, row, f"{share:.1f}%")
                bottom.text(*place, ha="center", va="center", color=DARK, fontweight="bold")
            left += share
    bottom.set_yticks(range(len(rows)), [text for text, _ in rows])
    bottom.axhline(0.5, color=INK, linewidth=0.8)
    bottom.invert_yaxis()
    bottom.set(xlim=(0, 100), xlabel="share of the total, in percent")
    bottom.tick_params(axis="y", length=0)
    save(figure, folder, "anchor_losses")


def draw_losses(folder: Path) -> None:
    """Draw balanced cross entropy and the focal loss over the probability of the true label."""
    p = torch.linspace(0.005, 0.9995, 300, dtype=torch.float64)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.6, 3.9), sharey=True, layout="constrained"
    )
    x = p.logit()
    plain = style.losses_of(x, 1.0, 0.0)
    curves = ((1.0, INK, "unweighted"), (0.75, ORANGE, "0.75 for objects"))
    for factor, colour, text in (*curves, (0.25, BLUE, "0.25 for background")):
        left.plot(p, factor * plain, color=colour, label=text)
    left.set_title("balanced cross entropy")
    for gamma, colour in zip((0, 0.5, 1, 2, 5), (INK, BLUE, GREEN, ORANGE, PINK), strict=True):
        text = f"{style.GAMMA} = {gamma:g}" + (" (cross entropy)" if gamma == 0 else "")
        right.plot(p, style.losses_of(x, 1.0, gamma), color=colour, label=text)
    right.set_title("focal loss")
    for axes in (left, right):
        axes.axvspan(0.9, 1, color=INK, alpha=0.15, linewidth=0)
        axes.text(0.95, 1.35, "easy", color=INK, ha="center", rotation=90)
        axes.legend(frameon=False, loc="upper right")
        axes.set(xlim=(0, 1), ylim=(0, 4.2), xlabel="$p_t$, the probability of the true label")
    left.set_ylabel("loss")
    save(figure, folder, "losses")


def draw_network(folder: Path) -> None:
    """Draw backbone, pyramid and subnets, with the shapes for an 800 x 1333 image and 80 classes."""
    figure, axes = plt.subplots(figsize=(7.8, 5.4))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 100), ylim=(0, 70))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, colour: str, *lines: str) -> None:
        options: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.8", "linewidth": 1.4}
        shape = FancyBboxPatch((x, y), width, height, edgecolor=colour, facecolor="none", **options)
        axes.add_patch(shape)
        axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, edgecolor="none", facecolor=colour, alpha=0.12, **options
            )
        )
        for i, line in enumerate(lines):
            at = y + height * (1 - (i + 0.5) / len(lines) * 0.84 - 0.08)
            weight = "bold" if i == 0 else "normal"
            place = (x + width / 2, at, line)
            axes.text(*place, ha="center", va="center", fontsize=9.5, fontweight=weight)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        look = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, start, arrowprops=look)

    rows = {3: 4, 4: 16, 5: 28, 6: 40, 7: 52}  # bottom of the boxes
    titles = (
        (11, "backbone (ResNet-50)"),
        (47, "feature pyramid"),
        (84.5, "subnets, shared by all levels"),
    )
    for x, title in titles:
        axes.text(x, 66.5, title, ha="center", va="center", fontsize=10, fontweight="bold")
    for level, y in rows.items():
        height, width = MAPS[level]
        size = f"{height} {TIMES} {width}"
        if level in CHANNELS:
            box(1, y, 20, 9, BLUE, f"C{level}", f"{CHANNELS[level]} {TIMES} {size}")
            arrow((21, y + 4.5), (36, y + 4.5))
            axes.text(28.5, y + 5.6, f"1{TIMES}1 conv", ha="center", fontsize=9)
        box(36, y, 22, 9, ORANGE, f"P{level}, stride {2**level}", f"256 {TIMES} {size}")
        arrow((58, y + 4.5), (65, y + 4.5))
    for y in (13, 25):
        arrow((11, y), (11, y + 3))  # up the backbone
        arrow((47, y + 3), (47, y))  # down the pyramid
        axes.text(48.5, y + 1.4, f"upsample {TIMES}2, add", va="center", fontsize=9)
    axes.plot((11, 11, 33), (37, 44.5, 44.5), color=INK, linewidth=1.2)
    arrow((33, 44.5), (36, 44.5))
    axes.text(22, 45.8, f"3{TIMES}3 conv, stride 2", ha="center", fontsize=9)
    arrow((47, 49), (47, 52))
    axes.text(45.5, 50.4, f"ReLU, 3{TIMES}3 conv, stride 2", ha="right", va="center", fontsize=9)
    axes.plot((65, 65), (rows[3] + 4.5, rows[7] + 4.5), color=INK, linewidth=1.2)
    arrow((65, 47), (70, 47))
    arrow((65, 18), (70, 18))
    tower = f"4 {TIMES} (3{TIMES}3 conv, 256, ReLU)"
    last = f"3{TIMES}3 conv"
    out = f"{TIMES} H {TIMES} W"
    box(70, 37, 29, 20, GREEN, "class subnet", tower, last, f"9 {TIMES} 80 = 720 {out}")
    box(70, 8, 29, 20, PURPLE, "box subnet", tower, last, f"9 {TIMES} 4 = 36 {out}")
    axes.text(11, 1.4, f"image: 3 {TIMES} 800 {TIMES} 1344", ha="center", va="center", fontsize=9.5)
    arrow((11, 2.4), (11, 4))
    cells = sum(height * width for height, width in MAPS.values())
    axes.text(
        47, 1.4, f"{cells:,} cells, {9 * cells:,} anchors", ha="center", va="center", fontsize=9.5
    )
    save(figure, folder, "network")


# ------------------------------------------------------------------------------------------ photos


def outline(
    picture: Image.Image, boxes: Tensor, colour: str, *, alpha: int = 255, width: int = 2
) -> None:
    """Draw the outlines of boxes, without labels, on a picture."""
    layer = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(layer)
    for box in boxes.tolist():
        x1, y1, x2, y2 = (round(side) for side in box)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
    layer.putalpha(layer.getchannel("A").point(lambda value: value * alpha // 255))
    picture.paste(layer, mask=layer)


def dots(picture: Image.Image, centres: Tensor, colour: str, radius: float) -> None:
    """Draw dots at the ``(x, y)`` of some anchors."""
    draw = ImageDraw.Draw(picture)
    for x, y in centres.tolist():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def centres_of(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def sheet(panels: Sequence[tuple[Image.Image, str]], folder: Path, name: str) -> None:
    """Write panels with their captions, two in a row, as one JPEG file."""
    width, height = PANEL
    rows = (len(panels) + 1) // 2
    picture = Image.new("RGB", (2 * width + GAP, rows * (height + GAP) - GAP), INK)
    font = ImageFont.load_default(22)
    for i, (panel, caption) in enumerate(panels):
        draw = ImageDraw.Draw(panel)
        right = draw.textbbox((10, 0), caption, font=font)[2]
        draw.rectangle((0, height - 34, right + 10, height), fill=DARK)
        draw.text((10, height - 30), caption, fill="white", font=font)
        picture.paste(panel, (i % 2 * (width + GAP), i // 2 * (height + GAP)))
    path = folder / f"explained_{name}.jpg"
    for quality in range(80, 40, -5):  # the best that stays below the limit
        picture.save(path, quality=quality, optimize=True, progressive=True)
        if path.stat().st_size <= LARGEST_FILE:
            break


def draw_anchors(photo: Photo, A: int, folder: Path) -> None:
    """Draw the nine anchors of one cell on each of three levels, and a square of every level."""
    panels = []
    truths = photo.target["boxes"]
    start = 0
    for level in range(3):
        anchors = photo.anchors[level]
        matched = photo.matched_idxs[start : start + len(anchors)]
        start += len(anchors)
        panel = photo.picture.copy()
        dots(panel, photo.to_panel(centres_of(anchors[::A]).repeat(1, 2))[:, :2], "#ffffff", 2.0)
        outline(panel, photo.to_panel(truths), "#ffffff", width=2)
        positive = (matched >= 0).nonzero()[:, 0]
        if len(positive):  # the cell of the anchor that fits its object best
            fit = iou_of(anchors[positive], truths[matched[positive]])
            best = int(positive[fit.argmax()])
            first = best // A * A
            outline(panel, photo.to_panel(anchors[first : first + A]), BLUE, width=2)
            outline(panel, photo.to_panel(anchors[best : best + 1]), ORANGE, width=4)
        height, width = photo.grids[level]
        panels.append((panel, f"P{level + 3}: {height} x {width} cells, {len(anchors):,} anchors"))
    panel = photo.picture.copy()
    for level, colour in enumerate((ORANGE, GREEN, BLUE, PURPLE, PINK)):
        anchors = photo.anchors[level]
        square = anchors[A // 3 :: A]  # ratio 1, scale 1
        middle = torch.tensor([photo.size[1] / 2, photo.size[0] / 2])
        nearest = int((centres_of(square) - middle).norm(dim=1).argmin())
        outline(panel, photo.to_panel(square[nearest : nearest + 1]), colour, width=4)
    panels.append((panel, f"One square of each level, P3 to P{2 + len(photo.anchors)}"))
    sheet(panels, folder, "anchors")


def iou_of(first: Tensor, second: Tensor) -> Tensor:
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    shared = sides.clamp(min=0).prod(dim=1)
    areas = (first[:, 2:] - first[:, :2]).prod(dim=1) + (second[:, 2:] - second[:, :2]).prod(dim=1)
    return shared / (areas - shared)


def draw_matching(photo: Photo, class_names: Sequence[str], folder: Path) -> None:
    """Draw the objects, the positive anchors, the ignored ones and the cells of the background."""
    labels = photo.target["labels"]
    objects = draw_boxes(
        photo.picture,
        photo.to_panel(photo.target["boxes"]),
        labels,
        texts=[class_names[label] for label in labels.tolist()],
        font_size=18,
    )
    anchors, matched = torch.cat(photo.anchors), photo.matched_idxs
    positive, ignored = photo.picture.copy(), photo.picture.copy()
    for index, box in enumerate(photo.target["boxes"]):
        mine = anchors[matched == index]
        colour = "#{:02x}{:02x}{:02x}".format(*class_color(int(labels[index])))
        outline(positive, photo.to_panel(mine), colour, alpha=170)
        outline(positive, photo.to_panel(box[None]), "#ffffff", width=2)
    outline(ignored, photo.to_panel(anchors[matched == BETWEEN]), "#30343a", alpha=120)
    background = photo.picture.copy()
    for kind, colour, radius in (
        (BACKGROUND, BLUE, 2.0),
        (BETWEEN, "#30343a", 3.0),
        (None, ORANGE, 3.5),
    ):
        mask = matched >= 0 if kind is None else matched == kind
        centres = centres_of(anchors[mask]).unique(dim=0)
        dots(background, photo.to_panel(centres.repeat(1, 2))[:, :2], colour, radius)
    counts = [
        int((matched >= 0).sum()),
        *(int((matched == k).sum()) for k in (BETWEEN, BACKGROUND)),
    ]
    panels = [
        (objects, f"{len(labels)} objects"),
        (positive, f"{counts[0]:,} positive anchors"),
        (ignored, f"{counts[1]:,} ignored anchors"),
        (background, f"{counts[2]:,} background anchors (blue)"),
    ]
    sheet(panels, folder, "matching")


def draw_inference(photo: Photo, steps: Candidates, threshold: float, A: int, folder: Path) -> None:
    """Draw scores, candidates, what survives suppression, and the detections."""
    heat = torch.zeros(PANEL[::-1])
    for scores, (height, width), anchors in zip(
        photo.scores, photo.grids, photo.anchors, strict=True
    ):
        best = scores.amax(dim=1).view(height, width, A).amax(dim=2)
        stride = float(centres_of(anchors[::A])[0, 0] * 2)
        covered = (
            best[None, None].repeat_interleave(int(stride), 2).repeat_interleave(int(stride), 3)
        )
        covered = covered[..., : photo.size[0], : photo.size[1]]
        large = torch.nn.functional.interpolate(covered, PANEL[::-1], mode="nearest")[0, 0]
        heat = torch.maximum(heat, large)
    colours = mpl.colormaps["inferno"](heat.numpy(), bytes=True)[..., :3]
    grey = photo.picture.convert("L").convert("RGB")
    scores_panel = Image.blend(grey, Image.fromarray(colours), 0.7)
    candidates, survivors = photo.picture.copy(), photo.picture.copy()
    outline(candidates, photo.to_panel(steps.boxes), BLUE, alpha=120, width=1)
    outline(survivors, photo.to_panel(steps.best), BLUE, width=2)
    detections = photo.found.filter(score_threshold=WANTED)
    final = draw_boxes(
        photo.picture,
        scale_boxes(detections.boxes, detections.image_size, PANEL[::-1]),
        detections.labels,
        texts=[
            f"{name} {score:.2f}"
            for name, score in zip(detections.label_names, detections.scores.tolist(), strict=True)
        ],
        font_size=18,
    )
    panels = [
        (scores_panel, "1. Best score of each cell"),
        (candidates, f"2. {len(steps.boxes):,} boxes score above {threshold:g}"),
        (survivors, f"3. Suppression; the best {len(steps.best):,} stay"),
        (final, f"4. {len(detections)} detections above {WANTED:g}"),
    ]
    sheet(panels, folder, "inference")


# ----------------------------------------------------------------------------------------- numbers


def numbers_of_losses(anchors: Anchors, photos: int) -> dict[str, str]:
    """Return what the page says about the losses of all photos, as it is written there."""
    groups = dict(zip(("positive", "hard", "easy"), anchors.groups, strict=True))
    found = {"photos": f"{photos:,}", "anchors that learn": f"{len(anchors.logits):,}"}
    for name, mask in groups.items():
        found[f"{name}, anchors"] = f"{100 * float(mask.double().mean()):.1f}%"
    for key, (_, alpha, gamma) in LOSSES.items():
        losses = anchors.losses(alpha, gamma)
        for name, mask in groups.items():
            found[f"{name}, {key}"] = f"{100 * float(losses[mask].sum() / losses.sum()):.1f}%"
    plain = anchors.losses(None, 0.0)
    for name in ("positive", "easy"):
        found[f"{name}, mean cross entropy"] = f"{float(plain[groups[name]].mean()):.2g}"
    found["easy per positive"] = f"{float(groups['easy'].sum() / groups['positive'].sum()):.0f}"
    return found


def numbers_of_photo(photo: Photo, steps: Candidates) -> dict[str, str]:
    """Return what the page says about the one photo, as it is written there."""
    matched = photo.matched_idxs
    return {
        "anchors per photo": f"{len(matched):,}",
        "objects": f"{len(photo.target['boxes'])}",
        "positive": f"{int((matched >= 0).sum()):,}",
        "ignored": f"{int((matched == BETWEEN).sum()):,}",
        "background": f"{int((matched == BACKGROUND).sum()):,}",
        "scores": f"{sum(level.numel() for level in photo.scores):,}",
        "candidates per level": ", ".join(f"{count:,}" for count in steps.above),
        "candidates": f"{len(steps.boxes):,}",
        "after suppression": f"{steps.after_suppression:,}",
        "detections": f"{len(photo.found.filter(score_threshold=WANTED))}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw everything and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("annotations", type=Path, help="COCO file, or another format")
    parser.add_argument("photos", type=Path, help="folder of the photos")
    parser.add_argument("--photo", default="BloodImage_00093.jpg", help="the photo that is drawn")
    parser.add_argument("--output", type=Path, default=style.HERE)
    options = parser.parse_args(arguments)
    mpl.rcParams.update({"axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK})
    mpl.rcParams.update({"xtick.color": INK, "ytick.color": INK})
    mpl.rcParams.update({"xtick.labelcolor": INK, "ytick.labelcolor": INK})
    torch.set_num_threads(1)  # for reproducible sums

    model = RetinaNet.from_pretrained(options.model).eval()
    dataset = DetectionDataset(read_annotations(options.annotations, options.photos))
    chosen, parts, found, limited = None, [], {}, 0
    with torch.inference_mode():
        for index in range(len(dataset)):
            photo, anchors = run(model, dataset, index)
            parts.append(anchors)
            found[int(dataset.image_ids[index])] = photo.found
            steps = infer(model, photo)
            limited += steps.above != steps.kept
            if Path(dataset.table.file_names[index]).name == options.photo:
                chosen = photo, steps
    if chosen is None:
        parser.error(f"no photo is called {options.photo!r}; choose one with --photo")
    together = Anchors(*(torch.cat(part) for part in zip(*parts, strict=True)))
    photo, steps = chosen
    A = model.anchor_generator.num_anchors

    draw_box_counts(options.output)
    draw_anchor_losses(together, len(dataset), options.output)
    draw_losses(options.output)
    draw_network(options.output)
    draw_anchors(photo, A, options.output)
    draw_matching(photo, dataset.class_names, options.output)
    draw_inference(photo, steps, model.config.score_threshold, A, options.output)
    numbers = {
        "AP": f"{100 * evaluate_coco(options.annotations, found).ap:.1f}",
        **numbers_of_losses(together, len(dataset)),
        **numbers_of_photo(photo, steps),
        "photos that the limit changes": f"{limited}",
    }
    text = json.dumps(numbers, indent=2)
    sys.stdout.write(f"{text}\n")
    (options.output / "explained.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
