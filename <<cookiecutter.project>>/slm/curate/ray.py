"""The same gates on a Ray cluster whose nodes see the project's folder at the same path: Ray Data judges the chunks and
shuffles by band key; the sketches of texts stay on the nodes, the verdicts are decided by the engine's own function."""

import pickle
from dataclasses import replace
from functools import lru_cache

import numpy as np

from slm.cluster import connect
from slm.curate import duplicates
from slm.curate.engine import Job, Part, judge_chunk
from slm.curate.read import Chunk
from slm.curate.text import Sketch
from slm.errors import SlmError


class Cluster:
    """A machine for judge(), as Local is one, at settings.curate.ray ("auto": the cluster that this machine is in)."""

    def __init__(self, job: Job, chunks: list[Chunk]):
        import ray

        self.job, self.chunks = job, chunks
        connect(job.settings.curate.ray, job.settings.root, "curate.ray")
        ray.data.DataContext.get_current().enable_progress_bars = False

    def judge(self) -> list[Part]:
        """The chunks, judged on the nodes; bands and shingles stay there."""
        import ray
        from ray import cloudpickle

        numbers = ray.data.range(len(self.chunks), override_num_blocks=len(self.chunks))
        held = {"job": cloudpickle.dumps(self.job), "chunks": self.chunks}
        try:
            self.judged = numbers.map_batches(_judge, batch_size=1, fn_kwargs=held).materialize()
        except ray.exceptions.RayError as error:
            raise SlmError(f"curate.ray: {str(error).strip().splitlines()[-1]}") from None
        light = {row["id"]: row["light"] for row in self.judged.select_columns(["id", "light"]).iter_rows()}
        return [pickle.loads(light[n]) for n in range(len(self.chunks))]

    def near(self, kept: list[np.ndarray], threshold: float) -> duplicates.Edges:
        """Near duplicates among the lines kept[i] of chunk i, rows numbered through: all rows with a band key in common
        come to one task, which compares them as one machine would."""
        firsts = np.cumsum([0, *map(len, kept)])
        found = [duplicates.NONE]
        if firsts[-1]:
            held = {"kept": kept, "firsts": firsts, "buckets": 1 + int(firsts[-1]) // 100_000}
            spread = self.judged.select_columns(["id", "heavy"]).map_batches(_spread, batch_size=1, fn_kwargs=held)
            met = spread.groupby("bucket").map_groups(_meet, batch_format="numpy", fn_kwargs={"threshold": threshold})
            found += [(b["first"], b["second"], b["similarity"]) for b in met.iter_batches(batch_format="numpy", batch_size=None)]
        first, second, similarity = map(np.concatenate, zip(*found, strict=True))
        _, once = np.unique((first << 32) | second, return_index=True)
        return first[once], second[once], similarity[once]


@lru_cache(1)
def _job(packed: bytes) -> Job:
    return pickle.loads(packed)  # once per process, with what it remembers


def _judge(batch: dict, job: bytes, chunks: list[Chunk]) -> dict:
    part = judge_chunk(_job(job), chunks[int(batch["id"][0])])
    heavy, nothing = (part.bands, part.sketch.shingles, part.sketch.starts), np.zeros(0, np.uint32)
    part = replace(part, bands=None, sketch=Sketch(part.sketch.text, part.sketch.shape, nothing, nothing))
    return {"id": batch["id"]} | {k: np.array([pickle.dumps(v)], object) for k, v in (("light", part), ("heavy", heavy))}


def _spread(batch: dict, kept: list[np.ndarray], firsts: np.ndarray, buckets: int) -> dict:
    n = int(batch["id"][0])
    bands, shingles, starts = pickle.loads(batch["heavy"][0])
    own = np.array([shingles[starts[k] : starts[k + 1]].tobytes() for k in kept[n]], object)
    keys, count = bands[kept[n]], bands.shape[1]
    return {
        "bucket": (keys % buckets + np.arange(count) * buckets).astype(np.int64).ravel(), "key": keys.astype(np.int64).ravel(),
        "row": np.repeat(firsts[n] + np.arange(len(own)), count), "shingles": np.repeat(own, count),
    }  # fmt: skip


def _meet(group: dict, threshold: float) -> dict:
    order = np.argsort(group["row"])
    own = [np.frombuffer(group["shingles"][n], np.uint32) for n in order]
    starts, nothing = np.cumsum([0, *map(len, own)]), np.zeros(len(own), np.uint64)
    shingles = Sketch(nothing, nothing, np.concatenate(own), starts).matrix()
    lines = [(np.arange(len(order)), group["key"][order])]
    return dict(zip(("first", "second", "similarity"), duplicates.near_edges(lines, group["row"][order], shingles, threshold), strict=True))
