"""Which codec a run gets, and why.

The one idea: the bytes of each are known well enough before anything is coded (the entropy from the
counts, the dense form from the last anchor), and so is the time of each per element and per change;
on a link of known speed the quickest of all wins, else the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.comm.codec.kernels import plain_bits
from gossamer.comm.codec.model import Counts

# zstd'd planes of gaps and steps against the entropy, measured on training traces
PLANES_OVER_ENTROPY = 1.6
# ns of coding and decoding together, per element of the run and per coded one, measured on one
# thread of a Xeon with AVX-512; only their ratios to the link matter
COST_NS = {"entropy": (2.0, 100.0), "planes": (0.8, 60.0), "dense": (8.0, 0.0)}


@dataclass(frozen=True, slots=True)
class Choice:
    """A codec and the estimates that chose it."""

    codec: str
    nbytes: dict[str, int]
    """Estimated bytes by codec."""
    why: str


def choose(counts: Counts, dense_nbytes: int, link_mbit: float | None) -> Choice:
    """The codec for a run that changes as `counts` says.

    `dense_nbytes` is what the run took when it was last sent whole.
    """
    changed, num_elements, bits = plain_bits(counts.elements, counts.first, counts.steps)
    entropy = int(bits / 8) + 2
    nbytes = {
        "entropy": entropy,
        "planes": int(entropy * PLANES_OVER_ENTROPY) + 8,
        "dense": dense_nbytes,
    }
    if link_mbit is None:
        codec = min(("entropy", "dense"), key=nbytes.__getitem__)
        return Choice(codec, nbytes, "smallest")
    ns_a_byte = 8e3 / link_mbit

    def total_ns(codec: str) -> float:
        per_element, per_change = COST_NS[codec]
        return num_elements * per_element + changed * per_change + nbytes[codec] * ns_a_byte

    codec = min(COST_NS, key=total_ns)
    return Choice(codec, nbytes, f"quickest on {link_mbit:g} Mbit/s")
