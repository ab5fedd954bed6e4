"""What every code means, and what to do: the table behind ``paceline explain``."""

from __future__ import annotations

from paceline.terms.explanation import Explanation
from paceline.terms.explanations_split import SPLIT

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
        "define `fn` at the top level of a module and pass numbers, strings, lists and dictionaries, by name.",
    ),
    "PL109": Explanation(
        "the run is not alive",
        "The run named has no living launcher, so there is nothing to stop and nobody to ask.",
        "`state` in its run.json says how it ended, `paceline logs RUN` what its ranks have printed.",
    ),
    "PL110": Explanation(
        "the script cannot be read as Python",
        "The file given to `paceline run` does not compile.",
        "run it once with plain `python`; the message names the line.",
    ),
    "PL111": Explanation(
        "too few workers are left",
        "The run lost workers, and cannot go on: nobody is left who has its state, or there are fewer than `--workers` asks "
        "for and the replacements died before they took part.",
        "`--resume auto` goes on from the newest checkpoint, if the run has made one (`--checkpoint`).",
    ),
    "PL112": Explanation(
        "no more workers can join",
        "The run is not elastic, is at its end, or has as many workers as it may have.",
        "start the run with `--workers MIN:MAX`; MAX is how many there may be.",
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
        "In a product the factors to the left split one replica of the model (`fsdp`, `tensor`, `pipeline`), and the last one may say "
        "what replicas exchange (`ddp`, `local_sgd`, `diloco`, `gossip`, ...). Parameter servers, exact sums and shared parameters "
        "arrange a whole run of unsplit replicas.",
        "`pipeline(2) * tensor(2) * ddp()`, for instance.",
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
    "PL208": Explanation(
        "not in an elastic run",
        "The option shares memory that a worker which dies in the middle of a write would leave half written.",
        "leave the option out, or start with `--workers N`: exactly N, and losing one ends the run.",
    ),
    "PL209": Explanation(
        "the strategy needs parameter servers that were not started",
        "Servers are processes of their own, which the launcher starts beside the workers. It must know the strategy for that: a script "
        "that names one with servers by itself comes too late.",
        "start with `paceline run SCRIPT -n N --strategy 'ps(...)'`; the script's own strategy may be left out.",
    ),
    "PL210": Explanation(
        "ranks that step on their own stay in step",
        "Under `local_sgd`, `diloco`, `easgd`, `gossip` and `sgp` every rank takes every step, or counts it. A gradient scaler leaves "
        "out steps by the gradients of one rank.",
        "train in bfloat16 without a scaler, or use `ddp()`.",
    ),
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
    "PL311": Explanation(
        "nobody can join this loop",
        "A worker that comes late begins in the epoch where the others are. It learns which one that is from `job.epochs`; a loop over "
        "`range(n)` would begin at 0.",
        "write `for epoch in job.epochs(n):`. Until then the workers that are left go on without a replacement.",
    ),
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
    "PL420": Explanation(
        "two workers with one name",
        "A worker of this name takes part in the run and lives, so a second one is not let in. Names are never used again within "
        "a run while their worker lives.",
        "leave naming to `paceline run` and `paceline join`; end the other process if it should not be there.",
    ),
    "PL421": Explanation(
        "two processes are one worker",
        "A second process came with name and incarnation of a worker that takes part and lives: the same start command was run twice, "
        "or a process was copied.",
        "start each worker by itself, with an incarnation of its own.",
    ),
    "PL422": Explanation(
        "the run has ended",
        "All members have done their work, so nobody can join any more.",
        "start a new run; `--resume` goes on from a checkpoint.",
    ),
    "PL423": Explanation(
        "this process is a member no longer",
        "The others went on in a newer epoch without this process: it gave no sign of life for a lease, or the launcher saw it end. "
        "What it does is refused everywhere, so that nothing is counted twice.",
        "nothing needs to be saved from it; a new worker takes its place. If it was only slow, look for a suspended process or a "
        "machine that was out of memory.",
    ),
    "PL424": Explanation(
        "a second coordinator",
        "Another process holds the journal of this run's membership. Two coordinators could tell two halves of the run different "
        "things.",
        "end the other one, or start the run under another name.",
    ),
    "PL425": Explanation(
        "the journal of the membership is damaged",
        "A record is not what was written, and later ones are: the disk lies. Epochs that were given out cannot be known for certain, so "
        "the coordinator does not go on.",
        "let the run end, and start a new one with `--resume` from its last checkpoint; check the disk.",
    ),
    "PL426": Explanation(
        "the coordinator cannot be reached",
        "This process waits for the others to go on, and has not heard anything of the coordinator for a minute.",
        "look whether the launcher and the coordinator live (`logs/coordinator.log`), and whether the network between them works.",
    ),
    "PL412": Explanation(
        "ranks train on different batches",
        "A step is one global batch, cut among the ranks. Here some ranks are at another batch than others: a batch was skipped, or a "
        "loop was left, on some ranks only.",
        "make the decision to skip or to leave depend on what all ranks share, never on a rank's own rows or loss.",
    ),
    "PL413": Explanation(
        "one step, batches of different sizes",
        "The script takes batches of several loaders in one step. Their rows cannot be cut into the same shares, so the weight of this "
        "rank's loss depends on which batch it is of.",
        "say it before each backward: `job.weight(len(x))`; or give the loaders the same batch size, or sizes that the number of "
        "processes divides.",
    ),
    "PL430": Explanation(
        "the other side does not have the job's secret",
        "Two processes of a job prove to each other that they know its secret before either says anything else. The proof did not "
        "come, or was wrong; a process that refuses does not say why.",
        "give the secret of this very run (`secret` in its directory); look whether another program listens at the address.",
    ),
    "PL431": Explanation(
        "a connection ended",
        "The other side closed the connection, died, or has not answered for too long; or the connection was closed here while "
        "somebody waited on it.",
        "the launcher names processes that died; between machines, look at the network.",
    ),
    "PL432": Explanation(
        "a frame was refused",
        "What came on a connection is not a frame of this protocol, is larger than its kind may be, or was changed on the way. The "
        "connection was closed; nothing of the frame was used.",
        "a fault of memory, network card or switch, or another program that talks to our port: the message says what was wrong.",
    ),
    "PL433": Explanation(
        "nobody answers at an address",
        "The connection to another process of the job could not be made in time.",
        "check that the process lives, that the address is right, and that no firewall is in between.",
    ),
    "PL434": Explanation(
        "no TLS to be had",
        "Connections that leave this machine are encrypted by TLS 1.3. This Python, or its OpenSSL, cannot do what that takes, so "
        "nothing is sent.",
        "use a Python with OpenSSL 1.1.1 or newer and Ed25519, or keep the run on one machine (127.0.0.1).",
    ),
    "PL435": Explanation(
        "not an address",
        "Addresses are `tcp:HOST:PORT`, `unix:/path` and `unix:@name`.",
        "the message shows what was given.",
    ),
    "PL436": Explanation(
        "the other side does not want this connection",
        "Both sides know the secret, but this connection is of a former epoch, or there is one already.",
        "the reason is in the message; a process that was fenced joins again under a new incarnation.",
    ),
    # ---- PL5xx: recognised while the run is alive -----------------------------------------------------------------
    "PL440": Explanation(
        "replicas differ",
        "The parameters of the ranks are compared every 50 steps. They differ, and no majority says which are right: a flipped bit, or "
        "the script changes parameters differently on each rank.",
        "resume from a checkpoint before the step named; with three ranks or more the odd one is healed by itself.",
    ),
    "PL442": Explanation(
        "ranks came to different gradients",
        "Under `ddp(commit=vote)` all ranks compare the gradient that they are about to step with. It is the same message for all, so something "
        "on the way is wrong: memory, a link of the script's own that is not the same on all ranks, or a defect of the wire.",
        "look at the rank named. `ddp()` has its replicas compared every 50 steps instead, and heals the odd one.",
    ),
    "PL441": Explanation(
        "a replica was healed",
        "One rank had other parameters than all the others. It was given theirs. When it happens again on the same machine, its "
        "memory is broken.",
        "look at the machine of the rank named; if the script changes parameters on one rank only, that is the cause.",
    ),
    "PL450": Explanation(
        "exact=True: one backward and one optimizer step for each batch that the loop is given",
        "With exact=True the loop goes round several times for one global batch, once for each of its shards that this rank has. The "
        "shards are added up by Paceline, and opt.step() does nothing before the last one, so each round must clear the gradients, call "
        "backward once and step once, and the loop may end only between two steps.",
        "for accumulation give the loader a larger batch_size; add several losses up and call backward once; call opt.zero_grad() in "
        "each round; end the loop by job.clock.step, not by a counter of rounds.",
    ),
    "PL451": Explanation(
        "exact=True does not go together with this",
        "The parameters would depend on the number of ranks: on how many rounds of the loop one step takes, or on how its rows are "
        "divided.",
        "train from an adopted loader that batches a data set with indices, with one adopted optimizer; adopt its schedule; leave "
        "GradScaler out; or use ddp() without exact=True.",
    ),
    "PL460": Explanation(
        "a parameter server is gone",
        "The process that kept (a part of) the parameters has ended, or cannot be reached. What it had applied since the last checkpoint "
        "is lost with it, unless there are two copies of each server.",
        "`paceline run ... --resume auto` goes on from the newest checkpoint; save more often with `--checkpoint every=30s`, or survive it "
        "with `ps(replicas=2)`.",
    ),
    "PL461": Explanation(
        "job.weight cannot be used here",
        "Several batches make one step, each weighted by hand. The servers add up pushes, one for each step, and cannot weight the batches "
        "in them.",
        "step after each batch, or leave job.weight out: rows are weighted by themselves.",
    ),
    "PL462": Explanation(
        "a worker and a server do not understand each other",
        "A message came that is not due, or makes no sense. Versions of Paceline may differ between machines.",
        "use the same version everywhere; if it is, this is a mistake in Paceline: please report it with the run directory.",
    ),
    "PL463": Explanation(
        "this does not go together with parameter servers",
        "The optimizer steps at the server. What decides about steps or learning rates elsewhere, or keeps parameters on another device, "
        "would be out of step with it.",
        "adopt the schedule; train in float32 or bfloat16 without a GradScaler; leave the model on the CPU; or use ddp().",
    ),
    "PL465": Explanation(
        "both copies of a parameter server are gone",
        "The second process ended before a new one had the state of the first. What was applied since the last checkpoint is gone with them.",
        "all servers begin again from the newest checkpoint where there is one (`--checkpoint every=30s`); two deaths within the seconds "
        "that a new process takes to start are most often one cause: look at the memory of the machine.",
    ),
    "PL466": Explanation(
        "two copies of a parameter server came to different parameters",
        "Both are told the same in the same order, and step the script's own optimizer. Its steps depend on something else: random numbers, "
        "a clock, or the memory that it was given; or a bit has flipped. The first copy's parameters are those of the run, and a new second "
        "one is made from them.",
        "if it comes again and again, leave `replicas` out and save often (`--checkpoint every=30s`), or make the optimizer deterministic.",
    ),
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
    "PL508": Explanation(
        "a process left before the end of its script",
        "A rank ended with status 0, which says that all is well, but its script had not come to its end. In an elastic run it "
        "counts as lost, like one that was killed, and is replaced.",
        "something called `os._exit(0)`, or a library ended the process; to end a script early, `sys.exit()` lets the job finish.",
    ),
    # ---- PL52x, PL53x: pipelines ------------------------------------------------------------------------------------
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
    "PL610": Explanation(
        "the checkpoint is not one of this job",
        "The state that was saved does not fit the models, optimizers or other things that the script has adopted. The message "
        "names the first difference. Nothing is cast, padded or left out.",
        "resume with the script that the checkpoint was saved by, or start without `--resume`.",
    ),
    "PL611": Explanation(
        "a checkpoint could not be saved",
        "Writing failed: full disk, input/output error, read-only file system. What was half written is removed, the checkpoints "
        "before it are untouched, training goes on, and it is tried again.",
        "free space; `paceline verify checkpoint RUN` tells what there is.",
    ),
    "PL612": Explanation(
        "something in the job's state cannot be saved",
        "A checkpoint holds numbers, text, lists, dictionaries and dense tensors. The message names an entry of a state_dict that is "
        "something else. Nothing is ever pickled.",
        "let its state_dict return plain values and tensors.",
    ),
    "PL613": Explanation(
        "a checkpoint is damaged",
        "The directory is no checkpoint, or what it holds is not what its manifest says. Nothing of it was used.",
        "resume from another one; `paceline verify checkpoint RUN` tells which are whole.",
    ),
    "PL614": Explanation(
        "there is nothing to resume from",
        "`--resume` names no checkpoint and no run that has a valid one.",
        "`paceline verify checkpoint RUN` lists the checkpoints of a run.",
    ),
    "PL615": Explanation(
        "a file of another format cannot be taken over",
        "`paceline checkpoint import` reads files of torch.save with `weights_only=True`, which runs nothing that is in them. This "
        "one holds something else than tensors and plain values, or no state of a model.",
        "save the model's state_dict alone: `torch.save(model.state_dict(), FILE)`.",
    ),
    **SPLIT,
}
