"""Figures of every round, kept in a file, so that rows may be measured in several calls."""
import json
import os
import statistics


class Results:
    """By row, then server: a list of the figures of each round."""

    def __init__(self, path):
        self.path = path
        self.rows = {}
        if path and os.path.exists(path):
            with open(path) as file:
                self.rows = json.load(file)

    def begin(self, row, conditions):
        """Forgets what an earlier call measured of this row."""
        self.rows[row] = {"conditions": conditions, "servers": {}, "failed": []}

    def add(self, row, server, figures):
        self.rows[row]["servers"].setdefault(server, []).append(figures)

    def fail(self, row, server, why):
        self.rows[row]["failed"].append(f"{server}: {why}")

    def save(self):
        if self.path:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with open(self.path, "w") as file:
                json.dump(self.rows, file, indent=1)

    def medians(self, row):
        """By server: each figure's median over the rounds."""
        if row not in self.rows:
            return {}
        return {server: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
                for server, rounds in self.rows[row]["servers"].items() if rounds}

    def failures(self, row):
        return list(dict.fromkeys(self.rows.get(row, {}).get("failed", [])))

    def conditions(self, row):
        return self.rows.get(row, {}).get("conditions", {})
