"""Episodes and instructions: lengths, words, coverage of the start states."""

from __future__ import annotations

from collections import Counter

import numpy as np

from vla_adapter_hf.doctor.findings import Finding
from vla_adapter_hf.doctor.recording import FrameSample, Recording
from vla_adapter_hf.training.probing import plain_text


def check_episodes(recording: Recording, chunk_size: int) -> list[Finding]:
    """Findings about the episodes as a whole."""
    return [
        *_unreadable(recording),
        *_lengths(recording, chunk_size),
        *_starts(recording),
        *_words(recording),
    ]


def _unreadable(recording: Recording) -> list[Finding]:
    words = [problem for problem in recording.problems if "no instruction" in problem or "no text" in problem]
    others = [problem for problem in recording.problems if problem not in words]
    findings = []
    if words:
        findings.append(
            Finding(
                "episodes without an instruction",
                "high",
                {"episodes": len(words), "of": len(recording.actions), "first": words[0]},
                "No sample can be made of them.",
                "Write the instruction, or give one for all with --instruction.",
            )
        )
    if others:
        findings.append(
            Finding(
                "episodes that cannot be used",
                "high",
                {"episodes": len(others), "of": len(recording.actions), "first": others[0]},
                "Training stops there, or leaves them out with --on_bad_episode skip.",
                "Repair or remove them.",
            )
        )
    return findings


def _lengths(recording: Recording, chunk_size: int) -> list[Finding]:
    lengths = np.array([len(actions) for _, _, actions in recording.episodes()])
    numbers = np.array([recording.numbers[position] for position, _, _ in recording.episodes()])
    findings = []
    short = lengths < chunk_size
    if short.any():
        findings.append(
            Finding(
                "episodes shorter than a chunk",
                "high" if short.mean() > 0.5 else "medium",
                {"episodes": int(short.sum()), "of": len(lengths), "chunk": chunk_size, "shortest": lengths.min()},
                "No whole chunk can be cut from them.",
                "Train with a shorter --chunk_size, with --pad_chunks true, or leave them out.",
                numbers[short].tolist(),
            )
        )
    usual = float(np.median(lengths))
    odd = ~short & ((lengths < usual / 4) | (lengths > 4 * usual))
    if odd.any():
        findings.append(
            Finding(
                "episodes of unusual length",
                "low",
                {"episodes": int(odd.sum()), "median": usual, "shortest": lengths.min(), "longest": lengths.max()},
                "Very short ones may have been broken off, very long ones hold waiting or several tries.",
                "Look at these episodes.",
                numbers[odd].tolist(),
            )
        )
    return findings


def _starts(recording: Recording) -> list[Finding]:
    starts = np.array([states[0] for _, states, _ in recording.episodes()])
    spread = recording.all_states.std(0)
    live = spread > 1e-9
    if len(starts) < 4 or not live.any():
        return []
    share = starts.std(0)[live] / spread[live]
    if share.max() > 0.02:
        return []
    return [
        Finding(
            "all episodes start in the same state",
            "low",
            {"largest spread of starts": share.max(), "measured in": "spread of all states"},
            "The policy has never seen another start, and small deviations lead it away.",
            "Vary the start of the arm while recording.",
        )
    ]


def _words(recording: Recording) -> list[Finding]:
    per_task = Counter(texts[0] for texts in recording.texts if texts)
    findings = []
    groups: dict[str, set[str]] = {}
    for text in per_task:
        groups.setdefault(plain_text(text), set()).add(text)
    variants = {key: sorted(texts) for key, texts in groups.items() if len(texts) > 1}
    if variants:
        findings.append(
            Finding(
                "instructions that differ only in writing",
                "low",
                {"instructions": variants},
                "The same task has several prompts. The published prompts are in lower case without a full stop.",
                "Write each task in one way.",
            )
        )
    few = {text: count for text, count in per_task.items() if count < 0.2 * np.median(list(per_task.values()))}
    if few:
        findings.append(
            Finding(
                "tasks with few episodes",
                "medium",
                {"episodes": few, "median": float(np.median(list(per_task.values())))},
                "The policy sees these tasks rarely and will do the others instead.",
                "Record more of them, or weigh the datasets.",
            )
        )
    several = [number for number, texts in zip(recording.numbers, recording.texts, strict=True) if len(texts) > 1]
    if several and len(several) < len(recording.texts):
        findings.append(
            Finding(
                "some episodes change their instruction on the way",
                "low",
                {"episodes": len(several), "of": len(recording.texts)},
                "Chunks near the change belong to two instructions.",
                "Check that this is meant.",
                several,
            )
        )
    return findings


def check_listening(recording: Recording, sample: FrameSample) -> list[Finding]:
    """Whether one picture goes with several instructions; otherwise nothing can teach a policy to listen."""
    texts = [texts[0] if texts else "" for texts in recording.texts]
    distinct = len({plain_text(text) for text in texts})
    if distinct == 1:
        return [
            Finding(
                "one instruction only",
                "low",
                {"instruction": texts[0]},
                "The policy does the same whatever it is asked.",
                "Nothing, if it is meant to have one task.",
            )
        ]
    positions = sorted(sample.first)
    labels = np.array([plain_text(texts[position]) for position in positions])
    counts = Counter(labels.tolist())
    if len(positions) < 8 or min(counts.values()) < 3:
        return []
    pictures = np.stack([sample.first[position] for position in positions]).reshape(len(positions), -1)
    square = (pictures**2).sum(1)
    distance = square[:, None] + square - 2 * pictures @ pictures.T
    np.fill_diagonal(distance, np.inf)
    guessed = float((labels[distance.argmin(1)] == labels).mean())
    chance = max(counts.values()) / len(labels)
    if guessed < max(0.95, chance):
        return []
    return [
        Finding(
            "the picture alone tells the instruction",
            "medium",
            {"instruction guessed from the most similar first frame": guessed, "by chance": chance},
            "Each scene comes with one instruction, so nothing teaches the policy to listen.",
            "Record several tasks in the same scene.",
        )
    ]
