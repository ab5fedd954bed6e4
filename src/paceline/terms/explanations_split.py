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
    "PL427": Explanation(
        "no replica of the model is whole",
        "Ranks hold parts of a model, and those that are left of different replicas have come to different steps, so that no replica has all of "
        "its parts of one step. It takes two faults at the same moment.",
        "begin again with `--resume auto`, which goes on from the newest checkpoint.",
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
    "PL520": Explanation(
        "a pipeline schedule that cannot be",
        "The schedule is not known, or torch's schedule of that name does not work for this number of micro-batches and ranks: 1f1b "
        "wants at least as many micro-batches as stages, the interleaved ones a multiple of their rounds.",
        "use another number of micro-batches (a multiple of the number of ranks always works), or schedule=gpipe.",
    ),
    "PL521": Explanation(
        "the model cannot be cut into that many stages",
        "A pipeline cuts a model between blocks: the children of its nn.Sequential, nn.ModuleList or nn.ModuleDict, in the order in "
        "which the forward calls them. There are fewer of them than stages, or the cuts that were named are not among them.",
        'name cuts that the forward passes through (`cuts=("blocks.2",)`), use fewer ranks, or fsdp(n), which cuts any model.',
    ),
    "PL522": Explanation(
        "the forward needs the value of something that another stage holds",
        "On every rank the model's own forward runs, and what other stages compute has a shape there and no value. The code between "
        "the blocks has read such a value, written it into another tensor, or kept it from an earlier block in a place that the "
        "pipeline does not see.",
        "do it inside of a block, pass tensors from block to block as arguments, or use fsdp(n) or tensor(n) for this model.",
    ),
    "PL523": Explanation(
        "the forward took another way than before",
        "Which blocks are called in which order is found out once for each shape of inputs, and stages rely on it. Layers that are "
        "dropped at random are one reason for a difference.",
        "switch off layer dropping, or make the order of blocks the same in every step.",
    ),
    "PL524": Explanation(
        "a deferred value was read before backward",
        "Under a pipeline `model(x)` returns tensors whose values are computed when `loss.backward()` is called: the batch passes "
        "through the stages then. Reading them earlier (`loss.item()`, `if loss > 3`, `print(float(loss))`) is not possible.",
        "read the loss after `loss.backward()`; to compute outputs without training, call the model under torch.no_grad().",
    ),
    "PL525": Explanation(
        "a large deferred value was read where it is not",
        "After backward every rank of a pipeline knows all numbers that were made before it, and outputs of up to 1 MiB. "
        "Larger outputs stay on the last stage.",
        "compute what you need of the outputs (an accuracy, a mean) before `loss.backward()` and read it afterwards.",
    ),
    "PL526": Explanation(
        "a parameter of another stage cannot be saved here",
        "`model.state_dict()` has all names under a pipeline, but a rank has the values of its own stage only.",
        "use `job.export(path)` for the whole model, or a checkpoint of the run.",
    ),
    "PL527": Explanation(
        "a parameter cannot be handed to another stage",
        "When a model is cut, each rank gives up the parameters of the other stages. Something still holds on to one of them: the "
        "graph of an earlier forward, a hook, or a weak reference.",
        "let the first forward of the model be the one inside of the training loop.",
    ),
    "PL528": Explanation(
        "the loss cannot be deferred",
        "What is done with the outputs of the model before `loss.backward()` is recorded and carried out on the last stage. The "
        "message names an operation for which that is not possible.",
        "compute the loss from the model's outputs and the batch, and call `loss.backward()` once.",
    ),
    "PL529": Explanation(
        "one forward, one backward",
        "Under a pipeline a batch passes through all stages, forwards and backwards, when `loss.backward()` is called. It cannot "
        "pass backwards twice, and two forwards cannot share a backward.",
        "add up losses before calling backward once; call the model again for another batch.",
    ),
    "PL530": Explanation(
        "a batch with fewer rows than micro-batches",
        "A pipeline cuts each batch into micro-batches of at least one row. Micro-batches need not be equal, but none can be empty.",
        "use a larger batch, fewer micro-batches, or `drop_last=True` for a short last batch.",
    ),
    "PL531": Explanation(
        "the loss is no sum over rows",
        "Schedules other than gpipe and loopedbfs begin the backward of one micro-batch before the forward of another, so the loss "
        "must be a sum (or weighted mean) over rows of the batch. The first batch is computed both ways, and they differ, or the "
        "loss combines rows: a contrastive loss, a maximum, a square root of a mean.",
        "use schedule=gpipe, which computes every loss once on the whole batch.",
    ),
    "PL532": Explanation(
        "the model does not treat rows of the batch one by one",
        "The output of the model for a whole batch is not the outputs for its pieces put together, in evaluation mode. So "
        "micro-batches would change what it computes. Perhaps rows are not the first dimension of its inputs, or an argument "
        "that is no batch has as many rows as one.",
        "put the batch first in all inputs; expand masks to the batch; or use fsdp(n) or tensor(n) for this model.",
    ),
    "PL533": Explanation(
        "an output of the model that cannot be put together from micro-batches",
        "Under a pipeline each output must have one dimension that grows with the batch, or be a number computed after the last block.",
        "return the batch in one dimension of each output.",
    ),
    "PL534": Explanation(
        "a rank of the pipeline was lost",
        "A stage waited for another one, whose process has ended or been cut off. Its own message says why, and is the one to read.",
        "look at the rank that failed first; a run with several replicas goes on without this one.",
    ),
    "PL512": Explanation(
        "a gradient scaler cannot be used with a pipeline",
        "A GradScaler leaves out steps whose gradients are not finite, as far as it sees: those of its own stage. Stages would take "
        "different steps.",
        "use bf16, which needs no scaler, or `fsdp` or `tensor`.",
    ),
    "PL513": Explanation(
        "a parameter of a split model is used outside of the model",
        "Ranks hold parts of it. A number made of parts, such as a penalty on weights, cannot be added to the loss of this rank's rows.",
        "compute the penalty inside of the model's forward, or let the optimizer do it: weight_decay.",
    ),
}
