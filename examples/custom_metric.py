"""A metric of your own: do the numbers of the reply agree with those of the reference?

finetune evaluate RUN --metric examples.custom_metric:right_numbers
evaluate(RUN, metrics=[right_numbers])                                  from Python
"""

import re


def right_numbers(reply: str, reference: str) -> float | None:
    """100 when the reply names the reference's numbers and no other; None where there are none."""
    wanted = set(re.findall(r"\d+(?:[.,]\d+)?", reference))
    if not wanted:
        return None
    return 100.0 * (set(re.findall(r"\d+(?:[.,]\d+)?", reply)) == wanted)
