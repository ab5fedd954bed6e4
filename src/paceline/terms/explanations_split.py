"""The codes of models that are split over ranks, a part of ``explanations``."""

from __future__ import annotations

from paceline.terms.explanation import Explanation

SPLIT: dict[str, Explanation] = {
    "PL211": Explanation(
        "the number of processes does not fit the strategy",
        "The factors of a product multiply to the number of processes: `pipeline(2) * ddp(2)` is four. One factor may leave its number "
        "out, and takes what is left.",
        "start as many processes as the message says, or write other numbers.",
    ),
    "PL212": Explanation(
        "two ways to split a model do not go together",
        "Each kind of axis may stand once in a product, at most one of them without a number, and a pipeline's stages are not sharded.",
        "see docs/strategies.md for the products that can be run.",
    ),
    "PL213": Explanation(
        "the processes were not started for this strategy",
        "Where ranks hold parts of a model, the launcher prepares how they meet, so it must know the strategy.",
        "name it on the command line, `--strategy 'fsdp()'`, not in the script.",
    ),
    "PL510": Explanation(
        "an optimizer and its model were not adopted together",
        "A model that is split gets other parameters, and its optimizer must go on with those. So both are given to one call of "
        "`job.adopt`.",
        "`model, opt, train = job.adopt(model, opt, train)`.",
    ),
    "PL511": Explanation(
        "there is no room for this training",
        "Before the first step it is added up what is certain to be needed: a gradient for each parameter, and the state of the "
        "optimizer, for all ranks of the machine. It is more than the machine, or the control group of the processes, has left.",
        "fsdp() cuts parameters, gradients and state among the ranks; or use fewer ranks, a smaller model, SGD instead of AdamW.",
    ),
}
