"""What can go wrong in the cluster package.

ClusterError
├── SettingsError      a flag, variable or YAML value is unknown, contradicts another or is not supported
├── PreflightError     this machine or checkpoint cannot serve as asked; said before anything is started
├── StartError         the cluster did not become ready; what was started has been stopped again
├── BadRecord          bytes in the record store are no record of ours
├── StoreUnavailable   Ray's control service did not answer within its deadline
├── ChangeRefused      what was asked of a running cluster is impossible or needs --force; nothing was changed
├── NotRunning         no running cluster is known for the URL
└── RequestFailed      a running cluster answered a command with an error, or not in time

Every message is one line that names the remedy; cluster/cli.py prints it on stderr and exits with code 1.
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base of this package's errors."""


class SettingsError(ClusterError):
    """A setting is unknown, malformed or not supported."""


class PreflightError(ClusterError):
    """Serving as asked is impossible here: bad checkpoint, port taken, too little memory."""


class StartError(ClusterError):
    """The cluster did not become ready."""


class BadRecord(ClusterError):
    """A record of an actor cannot be read: another program or version wrote it."""


class StoreUnavailable(ClusterError):
    """The record store did not answer in time: observe again later, keep what is known."""


class ChangeRefused(ClusterError):
    """A change of the desired state is impossible, or needs to be forced."""


class NotRunning(ClusterError):
    """No running cluster is known for a URL."""


class RequestFailed(ClusterError):
    """A command to a running cluster failed."""
