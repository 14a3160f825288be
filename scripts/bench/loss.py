"""The supervised-token loss against the loss over all logits: CPU seconds and peak memory.

    python scripts/bench/loss.py [--rounds 3] [--head trainable] [--json]

Forward and backward of the output layer and the loss alone, on random hidden states; the first
variant is what transformers computes. Bars, for a frozen head at 25 % supervised positions: at most
0.5 of its CPU seconds and 0.4 of its peak memory above the start. Exit code 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alternation import arguments_of, compare, measured, report

VARIANTS = ("full_logits", "supervised_positions", "chunked")
BARS = {"chunked": {"cpu_s": 0.5, "above_mib": 0.4}}


def run(options: argparse.Namespace) -> dict[str, float]:
    """Measure one variant in this process."""
    import torch
    import torch.nn.functional as F
    from transformers.loss.loss_utils import ForCausalLMLoss

    from finetune.models.loss import SupervisedHead, supervised_loss

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows, tokens, width = options.rows, options.tokens, options.hidden
    head = SupervisedHead(width, options.vocabulary, bias=False)
    head.requires_grad_(options.head == "trainable")
    hidden = torch.randn(rows, tokens, width, requires_grad=True)
    labels = torch.randint(0, options.vocabulary, (rows, tokens))
    labels[torch.rand(rows, tokens) >= options.supervised] = -100

    def work() -> float:
        if options.variant == "full_logits":
            loss = ForCausalLMLoss(head(hidden), labels, vocab_size=options.vocabulary)
        elif options.variant == "supervised_positions":
            places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
            loss = F.cross_entropy(head(hidden[:, :-1][places]).float(), labels[:, 1:][places])
        else:
            loss = supervised_loss(head, hidden, labels)
        loss.backward()
        return float(loss.detach())

    return measured(work)


def main() -> int:
    """Run all variants in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns; medians are shown (3)")
    parser.add_argument("--vocabulary", type=int, default=151552)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (256)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per row (512)")
    parser.add_argument("--supervised", type=float, default=0.25, help="share of positions (0.25)")
    parser.add_argument("--head", choices=["frozen", "trainable"], default="frozen")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one, in this process")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(run(options)))
        return 0
    names = ("vocabulary", "hidden", "rows", "tokens", "supervised", "head", "threads")
    medians = compare(
        __file__, VARIANTS, rounds=options.rounds, arguments=arguments_of(options, names)
    )
    standard = options.head == "frozen" and options.supervised <= 0.25
    return report(medians, BARS if standard else {}, as_json=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
