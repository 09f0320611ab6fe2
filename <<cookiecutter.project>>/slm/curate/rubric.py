"""The quality rubric of the optional judge: seven dimensions from 1 to 5, and when a row is accepted."""

DIMENSIONS = ("realism", "correctness", "format", "difficulty", "diversity", "learnability", "safety")
TOTAL_AT_LEAST, CORRECTNESS_AT_LEAST, FORMAT_IS, SAFETY_AT_LEAST = 26, 4, 5, 4


def accepts(scores: dict[str, int]) -> bool:
    """Whether a judged row passes: 26 of 35 points, correctness >= 4, format 5, safety >= 4. A missing score fails."""
    if any(not isinstance(scores.get(name), int) or not 1 <= scores[name] <= 5 for name in DIMENSIONS):
        return False
    enough = sum(scores[name] for name in DIMENSIONS) >= TOTAL_AT_LEAST
    exact = scores["format"] == FORMAT_IS
    return enough and exact and scores["correctness"] >= CORRECTNESS_AT_LEAST and scores["safety"] >= SAFETY_AT_LEAST
