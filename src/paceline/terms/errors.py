"""Every way Paceline says no: one tree of exceptions, one table of stable codes.

An error states what happened, with which value, and what to do. The code never changes its meaning;
``paceline explain PL203`` prints the entry below at length. Ranges: PL1xx the command line and the launcher,
PL2xx strategies and plans, PL3xx adoption and data, PL4xx the step and the wire, PL5xx what the observer
recognises while a run is alive, PL6xx files.
"""

from __future__ import annotations

from dataclasses import dataclass


class PacelineError(Exception):
    """Something Paceline refuses or could not do.

    Args:
        code: Stable code, a key of :data:`EXPLANATIONS`.
        message: What happened, with the value that made it happen.
        help: What to do now, for this very case. Without it the table's general help is shown.
    """

    def __init__(self, code: str, message: str, *, help: str | None = None) -> None:
        assert code in EXPLANATIONS, f"unknown error code {code}"
        super().__init__(message)
        self.code = code
        self.message = message
        self.help = help or EXPLANATIONS[code].help

    def __str__(self) -> str:
        return f"{self.code}: {self.message}\n  help: {self.help}"


class UsageError(PacelineError, ValueError):
    """The request itself cannot be carried out; nothing was started."""


class AdoptError(PacelineError, TypeError):
    """An object given to ``job.adopt`` cannot be driven as asked."""


class StepError(PacelineError, RuntimeError):
    """The training loop did something that would make the numbers wrong."""


class WireError(PacelineError, RuntimeError):
    """The exchange between ranks failed."""


class PeerLost(WireError):
    """A peer died or closed its end while this rank needed it."""


class Aborted(WireError):
    """The run is being ended; whoever waits stops waiting."""


class FileError(PacelineError, OSError):
    """A file of the run could not be written, read or believed."""

    def __str__(self) -> str:
        return PacelineError.__str__(self)


class Stopped(BaseException):
    """The run was asked to stop; unwinds the user's script at a step boundary. Not an ``Exception`` on purpose."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ``paceline explain`` prints for a code."""

    title: str
    text: str
    help: str


EXPLANATIONS: dict[str, Explanation] = {
    # ---- PL1xx: command line and launcher -------------------------------------------------------------------------
    "PL101": Explanation(
        "script not found",
        "The path given to `paceline run` is not a readable Python file.",
        "check the path; arguments of the script itself go after `--`.",
    ),
    "PL102": Explanation(
        "the script never adopted anything",
        "The script ended without a call of `job.adopt(...)`, so every process ran the whole program by itself and "
        "nothing was shared between them.",
        "add `job = paceline.job()` and `model, opt, train = job.adopt(model, opt, train)` before the loop.",
    ),
    "PL103": Explanation(
        "unusable number of processes",
        "The number of processes asked for cannot be had on this machine. Paceline never starts fewer than asked, "
        "because that would change the batch that each rank sees without a word.",
        "ask for between 1 and the limit named in the message.",
    ),
    "PL104": Explanation(
        "the launcher's variables contradict each other",
        "The environment of torchrun, Slurm or MPI names ranks, sizes or addresses that do not fit together.",
        "start the script through one launcher only and do not set RANK, WORLD_SIZE and their kin by hand.",
    ),
    "PL105": Explanation(
        "a setting has a value that it cannot have",
        "A flag or a keyword was given a value outside of its range.",
        "see `paceline run --help` for the values that it takes.",
    ),
    "PL106": Explanation(
        "no such run",
        "The name or directory given is not a run directory (it has no run.json).",
        "`ls runs/` shows the runs of this directory; give one of these or a path.",
    ),
    "PL107": Explanation(
        "unknown error code",
        "`paceline explain` knows codes of the form PL followed by three digits.",
        "`paceline explain` without a code lists all of them.",
    ),
    "PL108": Explanation(
        "the function cannot be launched",
        "`paceline.launch(fn)` starts fresh interpreters, so `fn` must be found again by its module and name, and its "
        "arguments and its result must be JSON values.",
        "define `fn` at the top level of a module and pass numbers, strings, lists and dictionaries.",
    ),
    "PL109": Explanation(
        "the run is not alive",
        "The run named has no living launcher, so there is nothing to stop.",
        "`paceline logs RUN` shows how it ended.",
    ),
    "PL110": Explanation(
        "the script cannot be read as Python",
        "The file given to `paceline run` does not compile.",
        "run it once with plain `python`; the message names the line.",
    ),
    # ---- PL2xx: strategies ----------------------------------------------------------------------------------------
    "PL201": Explanation(
        "unknown strategy",
        "The strategy text names a recipe that this version does not have.",
        "`paceline run --help` lists the recipes; a text is a product of calls such as `ddp(codec=bf16)`.",
    ),
    "PL202": Explanation(
        "strategy text cannot be read",
        "A strategy is a product of calls with literal arguments, `pipeline(2) * ddp(codec=bf16)`. It is parsed and never evaluated.",
        "look at the position marked in the message.",
    ),
    "PL203": Explanation(
        "a recipe was given an argument that it does not take",
        "The recipe exists, but one of its arguments is unknown, missing, or has a value that it cannot have.",
        "the message shows what the recipe takes.",
    ),
    "PL204": Explanation(
        "strategies cannot be combined",
        "The product asked for is not one that this version can run.",
        "use one of the recipes alone.",
    ),
    "PL205": Explanation(
        "the optimizer cannot be split between ranks",
        "`ddp(params=shared)` lets every rank update its slice of each tensor; that equals the whole update only for "
        "optimizers that work element by element.",
        "use `ddp()` (private parameters), or SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Adagrad or Adadelta.",
    ),
    "PL206": Explanation(
        "the wire cannot do what the strategy needs",
        "The strategy needs an operation that the wire chosen for this job does not have.",
        "let Paceline choose (`--wire auto`), or change the strategy as the message says.",
    ),
    # ---- PL3xx: adoption and data ---------------------------------------------------------------------------------
    "PL301": Explanation(
        "this object cannot be adopted",
        "`job.adopt` takes modules, optimizers, learning-rate schedulers, gradient scalers and data loaders.",
        "give anything else that has a `state_dict` to `job.keep(name=...)`.",
    ),
    "PL302": Explanation(
        "optimizers with a closure are refused",
        "L-BFGS and `opt.step(closure)` evaluate the loss again inside the step, as often as they like; ranks could not "
        "agree on how often, and the global gradient would be wrong.",
        "use an optimizer that takes one gradient a step, and call `opt.step()` without a closure.",
    ),
    "PL303": Explanation(
        "ranks hold different models",
        "At `adopt` all ranks compare names, order, shapes and types of their parameters and the settings of their "
        "optimizers. They differ, so a gradient of one would be added to another parameter on the next.",
        "build the same model on every rank: no `if rank`, no unordered sets, the same seed for random structure.",
    ),
    "PL304": Explanation(
        "an optimizer works on parameters of no adopted model",
        "The optimizer holds parameters that are not in any of the adopted models; their gradients would not be exchanged.",
        "adopt the module that owns these parameters too.",
    ),
    "PL305": Explanation(
        "this data loader cannot be split into rows",
        "Ranks take disjoint rows of each global batch. For this loader Paceline cannot tell what a row is.",
        "give the loader a batch_size, or yield tensors (or tuples, lists, dictionaries of tensors) with rows in dimension 0.",
    ),
    "PL306": Explanation(
        "ranks see different data orders",
        "The batches that ranks drew from their samplers are not the same, so rows would be lost or doubled.",
        "draw the order from torch's, Python's or NumPy's global generators or from the loader's `generator`; nothing else can be shared.",
    ),
    "PL307": Explanation(
        "the data loader raised",
        "Reading a batch failed on one rank: in the dataset, the collate function or a worker process.",
        "the traceback above is the dataset's own; the rows that were being read are named in the message.",
    ),
    "PL308": Explanation(
        "the position does not belong to this loader",
        "A saved position names another length or another order than the loader has now.",
        "resume with the same dataset, sampler and batch size, or start the epoch anew.",
    ),
    "PL309": Explanation(
        "adopt was called too late or twice",
        "The object was adopted before, or training had already begun.",
        "call `job.adopt` once, with everything, before the loop.",
    ),
    # ---- PL4xx: step and wire -------------------------------------------------------------------------------------
    "PL401": Explanation(
        "ranks do not agree on the number of optimizer steps",
        "The message of each gradient carries how many steps its sender has applied. The counts differ: some ranks called "
        "`opt.step()` and others did not, so their parameters are different models by now.",
        "call `opt.step()` on every rank; use `job.main` only for printing and files.",
    ),
    "PL402": Explanation(
        "ranks are in different places of the program",
        "Two ranks met on the wire in different operations: one left a loop early, or a call stands under `if rank == 0`.",
        "make every rank run the same calls; `job.log`, `job.count` and `print` are the ones that may differ.",
    ),
    "PL403": Explanation(
        "a peer was lost",
        "A process of the run died while this rank waited for its part of an exchange.",
        "the launcher names the process and its cause; this rank is only a witness.",
    ),
    "PL404": Explanation(
        "the run was aborted",
        "The launcher ended the run while this rank was waiting.",
        "look for the earliest failure; this rank is only a witness.",
    ),
    "PL405": Explanation(
        "shared memory is exhausted",
        "The host did not give the memory that the buckets need.",
        "free memory, raise the limit of the container, use fewer processes, or `--wire torch`.",
    ),
    "PL406": Explanation(
        "the network wire failed",
        "The collective library reported an error.",
        "see the message of the library below; check that all hosts reach each other on the interface used.",
    ),
    "PL407": Explanation(
        "no port or socket could be had",
        "The operating system refused a listening socket, a connection or a file descriptor.",
        "close what holds them (`ss -ltnp`, `ulimit -n`) or use the shared-memory wire, which needs none.",
    ),
    "PL408": Explanation(
        "a weight cannot be used",
        "`job.weight(w)` takes the finite, non-negative amount of loss terms of this rank's batch, and is called before `backward`.",
        "give the number of tokens (or rows) over which the loss of this batch is a mean.",
    ),
    "PL409": Explanation(
        "the loss or a gradient is not finite",
        "A gradient contains NaN or infinity. The message names the step, the ranks and their rows. Training goes on unless "
        "`--stop-on-nan` was given.",
        "look at the rows named; lower the learning rate, clip, or use a GradScaler with float16.",
    ),
    "PL410": Explanation(
        "a call came at the wrong moment",
        "The call needs something that has not happened yet, or that must not have happened.",
        "the message says what it waits for.",
    ),
    "PL411": Explanation(
        "this process cannot join the others",
        "The peers of this job could not be reached in time when the run was starting.",
        "check that all processes were started, with the same script and the same launcher.",
    ),
    # ---- PL5xx: recognised while the run is alive -----------------------------------------------------------------
    "PL501": Explanation(
        "a rank left its loop early",
        "One rank has ended its script while others wait for it in an exchange.",
        "make all ranks take the same number of steps; adopted loaders do that by themselves.",
    ),
    "PL502": Explanation(
        "a process was killed",
        "A rank ended by a signal. SIGKILL without a cause of yours is most often the kernel's out-of-memory killer.",
        "look at `dmesg`; ask for fewer processes or a smaller batch if memory was the cause.",
    ),
    "PL503": Explanation(
        "the script failed",
        "A rank raised an exception; the earliest one is the cause and is shown last. The other ranks were ended.",
        "the traceback is the script's own.",
    ),
    "PL504": Explanation(
        "nothing moves",
        "No rank has made progress for many times the usual duration of a step. The table says who waits for whom, and where.",
        "look at the rank that does not wait: it is the one the others wait for.",
    ),
    "PL505": Explanation(
        "ranks wait for each other in different operations",
        "All ranks wait, but not in the same operation, so none of them will ever go on.",
        "a collective call stands under a condition that differs between ranks; the lines are named above.",
    ),
    "PL506": Explanation(
        "a data loader is stuck",
        "A rank has been waiting for its next batch while all others wait for that rank.",
        "look at the dataset's `__getitem__` and at the worker processes of the rank named.",
    ),
    "PL507": Explanation(
        "ranks ended with different parameters",
        "At the end of the run the hash of the parameters is not the same on all ranks.",
        "parameters were changed outside the optimizer on some ranks (`if rank == 0`, unseeded noise, a manual load).",
    ),
    # ---- PL6xx: files ---------------------------------------------------------------------------------------------
    "PL601": Explanation(
        "the run directory cannot be written",
        "A file of the run directory could not be created or written: full disk, read-only file system or missing rights.",
        "free space or choose another place with `--run-dir`.",
    ),
    "PL602": Explanation(
        "the ledger does not prove what it should",
        "Rows are missing or counted twice, steps have gaps, or ranks disagree about the order of the data.",
        "the lines name the epoch, the step and the rows.",
    ),
    "PL603": Explanation(
        "a file is not what it claims to be",
        "A file of the run is truncated, has another hash than recorded, or is not in the format expected.",
        "restore it from a copy; nothing of it was used.",
    ),
}
