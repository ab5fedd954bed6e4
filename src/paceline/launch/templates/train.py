"""A small network learns to read handwritten digits, on one process or on many.

    python train.py                  one process: an ordinary PyTorch program
    paceline run train.py -n 2       two processes: the same batches, the same learning rate, the same curve

Take out the four numbered lines and what is left is plain PyTorch. The loop's body does not know how many processes
there are: a batch of 256 is 256 rows in all, and after `backward` the gradient is that of all 256.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline  # 1


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a digit classifier.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=256, help="rows per step, over all processes")
    parser.add_argument("--hidden", type=int, default=256, help="width of the hidden layer")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FILE", help="write the trained weights there (safetensors)")
    return parser.parse_args()


def load_data(batch_size):
    """1,797 pictures of 8x8 pixels; the last 297 are never trained on."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=batch_size, shuffle=True)
    test = DataLoader(TensorDataset(x[1500:], y[1500:]), batch_size=batch_size)
    return train, test


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    train, test = load_data(args.batch_size)
    model = nn.Sequential(nn.Linear(64, args.hidden), nn.ReLU(), nn.Linear(args.hidden, 10))
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr)

    job = paceline.job()  # 2
    model, opt, train, test = job.adopt(model, opt, train, test)  # 3

    for _ in job.epochs(args.epochs):  # 4: was range(args.epochs)
        for xb, yb in train:
            opt.zero_grad()
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            job.log(loss=loss)

        with job.evaluating(model):
            for xb, yb in test:
                job.count(correct=(model(xb).argmax(-1) == yb).sum(), seen=len(yb))
        job.log(accuracy=job.ratio("correct", "seen"))

    if job.main:  # true on exactly one process
        print(f"{job.ratio('correct', 'seen'):.1%} of the digits that it had not seen are read right")
    if args.save:
        job.export(args.save)


if __name__ == "__main__":
    main()
