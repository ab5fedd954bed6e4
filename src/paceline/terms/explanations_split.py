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
    "PL541": Explanation(
        "nothing in the model can be split by that many ranks",
        "Attention is split by heads, other layers by features, tables by words. Here no layer has enough of these, or its heads cannot "
        "be shared evenly. The message gives the reason for each layer.",
        "take a number of ranks that divides the heads, or `ddp` or `fsdp` for this model.",
    ),
    "PL542": Explanation(
        "the tensor-parallel plan is not understood",
        "A pattern of the plan fits no parameter and no layer of the model, or the word beside it is none that is known.",
        "patterns are those of fnmatch, over names as in model.named_parameters(); the words are column, row, vocab and replicate.",
    ),
    "PL543": Explanation(
        "a layer cannot be split as the plan asks",
        "The dim that would be cut is shorter than the number of ranks, or there is no rule for a layer of this kind.",
        "take this pattern out of the plan, or say 'replicate'.",
    ),
    "PL544": Explanation(
        "a split activation cannot be used like this",
        "Under tensor parallelism the activations inside a layer are held in parts. Most functions of torch work on them, and where "
        "one does not the activation is made whole. A few uses would make gradients wrong without a word: an autograd Function of "
        "your own, a change in place that has no rule, a parameter that is used outside of its model.",
        "hold the layer that makes this activation whole: plan={'NAME': 'replicate'}.",
    ),
    "PL550": Explanation(
        "sharding cannot be had as asked",
        "A model is split over one dimension of the mesh, in stage 1, 2 or 3, and its activations are recomputed for blocks, for "
        "none, or automatically.",
        "see the message for the value and what it may be.",
    ),
    "PL551": Explanation(
        "a model that cannot be split over ranks",
        "Sharding cuts every parameter along its rows and puts another one in its place. The message names what has no rows, "
        "carries something that would be lost, or is distributed already. Nothing was changed.",
        "change the model where the message says, or use `ddp`.",
    ),
    "PL552": Explanation(
        "parameters of several types in one unit",
        "The gradients of a unit are summed together, which needs one type. Nothing is converted without being asked.",
        "convert the model to one type before job.adopt, or use `ddp`.",
    ),
    "PL553": Explanation(
        "a precision that changes more than it says",
        "Lower precision changes the loss, so all of it must be asked for: in which type the model computes, and in which type "
        "gradients are summed over ranks.",
        "give both types, and a model in float32.",
    ),
    "PL554": Explanation(
        "there is nothing to offload from",
        "Offloading keeps the parts of a model in the memory of the CPU while an accelerator computes. This run computes on the CPU.",
        "leave out the offloading.",
    ),
    "PL555": Explanation(
        "an optimizer that needs whole parameters",
        "Under sharding an optimizer sees a part of each parameter. One that treats every number for itself computes the same on "
        "parts; this one does not, and it does not work on split tensors either.",
        "use an optimizer such as AdamW or SGD, or use `ddp`.",
    ),
    "PL556": Explanation(
        "a gradient came when its unit had been summed",
        "The gradients of a unit are summed over ranks as soon as backward leaves the unit. One came later, or within another "
        "backward pass, and would have been lost.",
        "call the model before anything else that uses its parameters, and checkpoint with use_reentrant=False.",
    ),
    "PL557": Explanation(
        "a parameter was read before it exists",
        "The model is built in parts: each rank keeps its own rows of the large parameters, so their values cannot be looked at "
        "while the model is built. Setting them, by any of torch.nn.init and by scaling and filling, is fine.",
        "read values after job.adopt, or build the model whole.",
    ),
    "PL558": Explanation(
        "batch normalisation over too few numbers",
        "In training the variance of a channel is that of all rows of the global batch, and one value has none.",
        "train with batches of more than one value per channel.",
    ),
    "PL540": Explanation(
        "no tensor-parallel plan could be derived",
        "`tensor(n)` learns how a model hangs together by running it once on torch's meta device, where tensors have shapes and no "
        "values. The inputs of this model could not be guessed from its first layers, or its forward decides by values.",
        "say how its layers are to be split: plan={'*.up': 'column', '*.down': 'row'}.",
    ),
}
