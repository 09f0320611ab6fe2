"""The planted faults: which gate should have caught each, and which one did."""


def planted_table(faults: list[dict], candidates: list):
    """One line per planted fault {"id", "fault", "gate", "twin"?}: the gate that should catch it, the one that did."""
    import pandas as pd

    found = {c.row.id: c for c in candidates if c.row is not None}
    # Of two alike rows either may be the one that goes.
    twins = {c.verdict.evidence.get("twin"): c.verdict.gate for c in candidates if c.verdict is not None}
    lines = []
    for fault in faults:
        candidate = found.get(fault["id"])
        own = candidate.verdict.gate if candidate and candidate.verdict else ""
        gate = own or twins.get(fault["id"], "")
        if candidate is None:
            state = "not in this run"
        elif gate:
            state = "caught" if own else "caught: twin refused"
        else:
            state = "NOT CAUGHT" if fault.get("twin", fault["id"]) in found else "twin not in this run"
        lines.append((fault["id"], fault["fault"], fault["gate"], gate, state))
    return pd.DataFrame(lines, columns=["id", "fault", "expected", "gate", "result"])
