"""What can go wrong with teams, keys and the ledger.

TenancyError
|- OpenToNetwork   the API would listen to the network without any key
|- KeyFileError    a key file is missing, half-written or not ours; or a change of it makes no sense
`- LedgerError     the ledger's database cannot be used
   `- JournalFull  usage cannot be written down: the disk is full, or nobody takes the journal away
"""

from __future__ import annotations


class TenancyError(Exception):
    """Base of this package's errors. Every message is one line that names the remedy."""


class OpenToNetwork(TenancyError):
    """An API without keys must not be reachable from the network unless that is said to be wanted."""


class KeyFileError(TenancyError):
    """A key file cannot be read, or cannot be changed as asked."""


class LedgerError(TenancyError):
    """The ledger's database cannot be used."""


class JournalFull(LedgerError):
    """There is no place to write down what another request uses."""
