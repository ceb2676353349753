"""What can go wrong in the cluster package.

ClusterError
├── SettingsError      a flag, variable or YAML value is unknown, contradicts another or is not supported
├── PreflightError     this machine or checkpoint cannot serve as asked; said before anything is started
├── FetchFailed        a checkpoint could not be fetched, or what came is not sound
├── StartError         the cluster did not become ready; what was started has been stopped again
├── BadRecord          bytes in the record store are no record of ours
├── StoreUnavailable   Ray's control service did not answer within its deadline
├── ChangeRefused      what was asked of a running cluster is impossible or needs --force; nothing was changed
├── NotRunning         no running cluster is known for the URL
├── RequestFailed      a running cluster answered a command with an error, or not in time
└── KubernetesError    the Kubernetes API refused a call
    ├── ApiUnavailable     no answer in time, or a server error: it may have happened all the same
    ├── ApiConflict        the object has changed since it was read: read it again
    ├── ApiForbidden       the Role lacks a verb
    ├── ApiNotFound        there is no such object
    └── ApiGone            a watch is too far behind: list again

Every message is one line that names the remedy; cluster/cli.py prints it on stderr and exits with code 1.
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base of this package's errors."""


class SettingsError(ClusterError):
    """A setting is unknown, malformed or not supported."""


class PreflightError(ClusterError):
    """Serving as asked is impossible here: bad checkpoint, port taken, too little memory."""


class FetchFailed(ClusterError):
    """A checkpoint could not be fetched whole; what came so far is kept."""


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


class KubernetesError(ClusterError):
    """The Kubernetes API refused a call for a reason that no other class names."""


class ApiUnavailable(KubernetesError):
    """The API server did not answer in time, or with a server error. A write may have happened."""


class ApiConflict(KubernetesError):
    """A guarded write found another version of the object than the one that was read."""


class ApiForbidden(KubernetesError):
    """The service account may not do this; the message names verb and resource."""


class ApiNotFound(KubernetesError):
    """There is no such object."""


class ApiGone(KubernetesError):
    """A watch cannot go on from its version (HTTP 410)."""
