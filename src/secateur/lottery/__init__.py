"""Strong lottery tickets: sub-networks of random networks, found without training, with proofs.

>>> from secateur.lottery import LogTicket, certify  # doctest: +SKIP
>>> ticket = LogTicket(eps=0.1).fit(model, domain=(0, 1), seed=7)  # doctest: +SKIP
>>> certify(ticket).bound <= 0.1  # doctest: +SKIP
True
"""

from secateur.lottery.certificate import Certificate, certify, certify_pruning
from secateur.lottery.copies import CopyTicket
from secateur.lottery.log_ticket import LogTicket
from secateur.lottery.malach import MalachTicket
from secateur.lottery.masked import MaskedNetwork, dense_layers
from secateur.lottery.network import Box, TargetNetwork
from secateur.lottery.reading import from_file, from_module
from secateur.lottery.store import load_ticket, save_network, save_ticket
from secateur.lottery.subset_sum import SubsetSumTicket
from secateur.lottery.ticket import Ticket, TicketSize

__all__ = [
    "Box",
    "Certificate",
    "CopyTicket",
    "LogTicket",
    "MalachTicket",
    "MaskedNetwork",
    "SubsetSumTicket",
    "TargetNetwork",
    "Ticket",
    "TicketSize",
    "certify",
    "certify_pruning",
    "dense_layers",
    "from_file",
    "from_module",
    "load_ticket",
    "save_network",
    "save_ticket",
]
