"""Many sequences decoded together in llama.cpp: the shared start of all prompts computed once, a free slot refilled."""

import codecs
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from slm.models.base import common_prefix

BATCH, UBATCH, CELLS = 2048, 512, 256  # tokens handed over at once, computed at once; memory is taken in such steps
LAST_N = 64  # generated tokens that the repeat penalty looks back on, as llama-cpp-python does
GUESS = 64  # tokens of a guess that are checked at once


@dataclass
class Job:
    """A prompt in token ids and what becomes of it. `sampler` chooses instead of the greedy rule, `grammar` binds it. A
    `guess` at the answer saves time where it is right; `other` is a repeat penalty, None once it would choose otherwise."""

    ids: list[int]
    limit: int
    stop: list[bytes] = field(default_factory=list)
    grammar: object = None
    sampler: object = None
    guess: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    found: list[tuple[bytes, float]] = field(default_factory=list)
    past: int = 0
    other: float | None = None
    finish: str = ""
    begin: float = 0.0
    first_s: float = 0.0
    seconds: float = 0.0

    def pieces(self) -> tuple[tuple[str, float], ...]:
        """Text and log probability of each token, cut where a stop text begins; half a character waits for its rest."""
        text, decoder = b"".join(piece for piece, _ in self.found), codecs.getincrementaldecoder("utf-8")("ignore")
        left, kept = min([text.index(s) for s in self.stop if s in text], default=len(text)), []
        for piece, log in self.found:
            kept.append((decoder.decode(piece[:left]), log))
            if (left := left - len(piece)) <= 0:
                break
        return tuple(kept)


class Sequences:
    """The memory of up to `slots` sequences over one loaded model; sequence 0 holds the prefix, or a lone prompt."""

    def __init__(self, llama, slots: int, repeat_penalty: float):
        import llama_cpp

        self._api, self._llama, self._penalty, self._texts = llama_cpp, llama, repeat_penalty, {}
        self._slots = min(slots, llama_cpp.llama_max_parallel_sequences() - 1)
        weights = llama._model.model
        self._rewinds = not (llama_cpp.llama_model_is_recurrent(weights) or llama_cpp.llama_model_is_hybrid(weights))
        self._context, self._held, self._size = None, [], (0, 0)

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self._context.close()
            self._batch.close()
        self._context, self._held, self._size = None, [], (0, 0)

    def run(self, jobs: list[Job], shared: int, on_done: Callable[[], None]) -> None:
        """Answer the jobs, which begin with the same `shared` tokens; a lone one reuses what the last lone one left."""
        lone = len(jobs) == 1
        self._make(0 if lone else min(self._slots, len(jobs)), max(len(job.ids) + job.limit for job in jobs))
        prefix, self._held = self._keep(jobs[0].ids if lone else jobs[0].ids[:shared]), []
        self._read(0, prefix, jobs[0].ids[prefix:shared], wanted=False)
        self._held = jobs[0].ids[: prefix if lone else shared]
        free, active = [0] if lone else list(range(self._size[0], 0, -1)), {}
        queue = sorted(jobs, key=lambda job: len(job.ids))
        while queue or active:
            while queue and free:  # a prompt is read by itself: mixed with others' next tokens it would be cut in two
                slot, job = free.pop(), queue.pop()
                job.begin, job.past, active[slot] = time.perf_counter(), len(job.ids), job
                if slot:
                    self._copy(0, slot)
                self._step(job, *self._read(slot, len(self._held), job.ids[len(self._held) :]))
                self._follow(slot, job)
                self._leave(active, free, on_done)
            while active and not queue and (top := max(active)) > (hole := min(free, default=top)):
                self._copy(top, hole)  # neighbours are computed in one go: the last ones move together
                active[hole] = active.pop(top)
                free[free.index(hole)] = top
            if active:
                parts = sorted(active.items())
                logits = self._decode([(slot, job.past, job.tokens[-1], True) for slot, job in parts])
                for place, (_, job) in enumerate(parts):
                    job.past += 1
                    self._step(job, logits[place], place)
                self._leave(active, free, on_done)
        if lone:
            self._held = (jobs[0].ids + jobs[0].tokens)[: jobs[0].past]

    def logits(self, ids: list[int], places: list[int]):
        """Logits after the tokens at `places` of a lone sequence, in order: (places, vocabulary)."""
        import numpy as np

        self._make(0, len(ids))
        past, self._held = self._keep(ids[: places[0]]), []
        parts = [(0, n, ids[n], n in places) for n in range(past, len(ids))]
        found = [np.array(self._decode(parts[n : n + BATCH]), ndmin=2) for n in range(0, len(parts), BATCH)]
        self._held = ids
        return np.concatenate([part for part in found if part.shape[1] > 1])

    @staticmethod
    def _leave(active: dict[int, Job], free: list[int], on_done: Callable[[], None]) -> None:
        for slot in [slot for slot, job in active.items() if job.finish]:
            job = active.pop(slot)
            job.seconds = time.perf_counter() - job.begin
            free.append(slot)
            on_done()

    def _make(self, slots: int, cells: int) -> None:
        if slots <= self._size[0] and cells <= self._size[1] and self._context:
            return
        from llama_cpp import _internals

        slots, cells = max(slots, self._size[0]), max(-(-cells // CELLS) * CELLS, self._size[1])
        self.close()
        params = type(self._llama.context_params).from_buffer_copy(self._llama.context_params)
        params.n_ctx, params.n_seq_max, params.kv_unified = cells * (slots + 1), slots + 1, False
        params.n_batch, params.n_ubatch = BATCH, UBATCH
        self._context = _internals.LlamaContext(model=self._llama._model, params=params, verbose=False)
        self._batch = _internals.LlamaBatch(n_tokens=BATCH, embd=0, n_seq_max=1, verbose=False)
        self._size = slots, cells

    def _keep(self, tokens: list[int]) -> int:
        """Cut sequence 0 down to what it has in common with `tokens`, one less than all; returns how many that are."""
        same = max(0, common_prefix([self._held, tokens]))
        if not self._api.llama_memory_seq_rm(self._context.memory, 0, same, -1):  # a recurrent model: all or nothing
            self._api.llama_memory_seq_rm(self._context.memory, 0, -1, -1)
            same = 0
        return same

    def _copy(self, source: int, target: int) -> None:
        self._api.llama_memory_seq_rm(self._context.memory, target, -1, -1)
        self._api.llama_memory_seq_cp(self._context.memory, source, target, -1, -1)

    def _read(self, slot: int, past: int, tokens: list[int], wanted: bool = True):
        """Read part of a prompt into a sequence; returns the logits of its last token and its place in the batch."""
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            last = len(part) - 1 if wanted and start + BATCH >= len(tokens) else -1
            logits = self._decode([(slot, past + start + n, token, n == last) for n, token in enumerate(part)])
        return (logits[0], last) if wanted else None

    def _follow(self, slot: int, job: Job) -> None:
        """Read the guess in one go, as far as the job chooses the same tokens; what it does not choose is forgotten."""
        while self._rewinds and not job.finish and job.tokens == job.guess[: len(job.tokens)]:
            part = job.guess[len(job.tokens) - 1 :][:GUESS]
            for place, logits in enumerate(self._decode([(slot, job.past + n, token, True) for n, token in enumerate(part)])):
                job.past += 1
                self._step(job, logits, place)
                if job.finish or job.tokens != job.guess[: len(job.tokens)]:
                    break
            self._api.llama_memory_seq_rm(self._context.memory, slot, job.past, -1)

    def _decode(self, parts: list[tuple[int, int, int, bool]]):
        """Compute (sequence, position, token, whether its logits are wanted); returns those, (wanted, vocabulary)."""
        import numpy as np

        batch = self._batch.batch
        for n, (slot, place, token, wanted) in enumerate(parts):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, place, 1, wanted
            batch.seq_id[n][0] = slot
        batch.n_tokens = len(parts)
        self._context.decode(self._batch)
        shape = sum(part[3] for part in parts), self._llama.n_vocab()
        return np.ctypeslib.as_array(self._context.get_logits(), shape) if shape[0] else None

    def _step(self, job: Job, logits, place: int) -> None:
        """Choose the next token of a job from its logits, those of token `place` of the batch."""
        import numpy as np

        token = job.sampler.sample(self._context, place) if job.sampler else self._greedy(job, logits, self._penalty)
        if job.other and self._greedy(job, logits, job.other) != token:
            job.other = None
        job.first_s = job.first_s or time.perf_counter() - job.begin
        if token is None or self._api.llama_vocab_is_eog(self._llama._model.vocab, token):
            job.finish = "error" if token is None else "stop"
            return
        if token not in self._texts:
            self._texts[token] = self._llama.detokenize([token])
        top = float(logits.max())
        log = float(logits[token]) - top - float(np.log(np.exp(logits - top).sum()))
        job.tokens.append(token)
        job.found.append((self._texts[token], log))
        if job.stop and any(s in b"".join(piece for piece, _ in job.found) for s in job.stop):
            job.finish = "stop"
        elif len(job.tokens) >= job.limit:
            job.finish = "length"

    def _greedy(self, job: Job, logits, penalty: float) -> int | None:
        """The likeliest token after the repeat penalty that the grammar allows; None when it allows none."""
        import numpy as np

        if penalty != 1.0 and job.tokens:
            seen, logits = list(set(job.tokens[-LAST_N:])), logits.copy()
            logits[seen] = np.where(logits[seen] <= 0, logits[seen] * penalty, logits[seen] / penalty)
        if not job.grammar:
            return int(logits.argmax())
        for most in (1, 64, len(logits)):  # the grammar is slow: it judges all tokens only where it refused the best
            ids = logits.argmax(keepdims=True) if most == 1 else np.argpartition(logits, -most)[-most:]
            table = np.zeros(most, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
            table["id"], table["logit"] = ids, logits[ids]
            data = table.ctypes.data_as(ctypes.POINTER(self._api.llama_token_data))
            array = self._api.llama_token_data_array(data, most, -1, False)
            self._api.llama_sampler_apply(job.grammar, ctypes.byref(array))
            token, logit, _ = table[table["logit"].argmax()].tolist()
            if np.isfinite(logit):
                self._api.llama_sampler_accept(job.grammar, token)
                return token
        return None
