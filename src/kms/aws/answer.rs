//! What AWS's errors mean: an outage, a denial, or damage.

use std::error::Error;

use aws_sdk_kms::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_sts::operation::assume_role::AssumeRoleError;

use crate::kms::{KmsError, OutageCause};
use crate::tenant::{Kek, KekId};

/// A failed call.
pub(super) type SdkFailure<E> = SdkError<E>;

/// An answer that lacks what AWS always gives.
pub(super) fn incomplete(kek: &KekId, call: &str) -> KmsError {
    KmsError::outage(kek, format!("{call}: the answer is incomplete"))
}

/// The meaning of a failed call. The text names the call, so that an operator sees which IAM action is concerned.
pub(super) fn to_error<E>(kek: &Kek, call: &str, failure: &SdkFailure<E>) -> KmsError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let kek = &kek.id;
    let SdkError::ServiceError(service) = failure else { return unanswered(kek, call, failure) };
    let code = failure.code().unwrap_or("an error without a name");
    let detail = match failure.message() {
        Some(message) => format!("{call}: {code}: {message}"),
        None => format!("{call}: {code}"),
    };
    match meaning(code, service.raw().status().as_u16(), call) {
        Meaning::Denied => KmsError::denied(kek, detail),
        Meaning::Damaged => KmsError::damaged(kek, detail),
        Meaning::Outage(cause) => KmsError::outage_by(kek, cause, detail),
    }
}

#[derive(Debug, PartialEq)]
enum Meaning {
    Denied,
    Damaged,
    Outage(OutageCause),
}

/// By AWS's name of the error, and where that is not known by the HTTP status.
fn meaning(code: &str, status: u16, call: &str) -> Meaning {
    match code {
        "AccessDeniedException" | "AccessDenied" | "DisabledException" | "KMSInvalidStateException"
        | "NotFoundException"
        // The KEK is not one that can wrap data keys, or AWS knows no such key at all.
        | "InvalidKeyUsageException" | "InvalidArnException" | "UnsupportedOperationException"
        | "InvalidGrantTokenException" => Meaning::Denied,
        "InvalidCiphertextException" | "IncorrectKeyException" => Meaning::Damaged,
        // The only thing in these calls that a stranger chooses is the wrapped key.
        "ValidationException" => {
            if matches!(call, "Decrypt" | "ReEncrypt") { Meaning::Damaged } else { Meaning::Denied }
        }
        _ => Meaning::Outage(cause(code, status)),
    }
}

fn cause(code: &str, status: u16) -> OutageCause {
    const THROTTLES: [&str; 5] = [
        "ThrottlingException",
        "Throttling",
        "TooManyRequestsException",
        "LimitExceededException",
        "RequestLimitExceeded",
    ];
    if status == 429 || THROTTLES.contains(&code) {
        OutageCause::Throttled
    } else if code == "KeyUnavailableException" {
        OutageCause::KeyUnavailable
    } else if status >= 500 {
        OutageCause::Unreachable
    } else {
        // Expired, unknown or badly signed credentials and the like: nobody has decided anything about the key.
        OutageCause::Credentials
    }
}

/// No answer of the KMS: the connection, the time, or the credentials.
fn unanswered<E>(kek: &KekId, call: &str, failure: &SdkFailure<E>) -> KmsError
where
    E: Error + 'static,
{
    let detail = format!("{call}: {}", DisplayErrorContext(failure));
    if let Some(refusal) = refused_role(failure) {
        return if refusal == "AccessDenied" || refusal == "AccessDeniedException" {
            // The owner of the role no longer trusts this service: his way of cutting it off.
            KmsError::denied(kek, detail)
        } else {
            KmsError::outage_by(kek, OutageCause::Credentials, detail)
        };
    }
    let cause = match failure {
        SdkError::TimeoutError(_) | SdkError::ResponseError(_) => OutageCause::Unreachable,
        SdkError::DispatchFailure(dispatch) if dispatch.is_io() || dispatch.is_timeout() => {
            OutageCause::Unreachable
        }
        _ => OutageCause::Credentials,
    };
    KmsError::outage_by(kek, cause, detail)
}

/// The name of STS's error, where the role could not be assumed because STS said so.
fn refused_role(failure: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(failure);
    while let Some(error) = next {
        if let Some(refused) = error.downcast_ref::<SdkError<AssumeRoleError>>() {
            return refused.code().map(str::to_owned);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outage_denial_and_damage_are_told_apart() {
        for code in
            ["AccessDeniedException", "DisabledException", "KMSInvalidStateException", "NotFoundException"]
        {
            assert_eq!(meaning(code, 400, "Decrypt"), Meaning::Denied, "{code}");
        }
        for code in ["InvalidCiphertextException", "IncorrectKeyException", "ValidationException"] {
            assert_eq!(meaning(code, 400, "Decrypt"), Meaning::Damaged, "{code}");
        }
        let outage = |cause| Meaning::Outage(cause);
        assert_eq!(meaning("ThrottlingException", 400, "Decrypt"), outage(OutageCause::Throttled));
        assert_eq!(meaning("KMSInternalException", 500, "Encrypt"), outage(OutageCause::Unreachable));
        assert_eq!(meaning("DependencyTimeoutException", 500, "Encrypt"), outage(OutageCause::Unreachable));
        assert_eq!(meaning("KeyUnavailableException", 500, "Encrypt"), outage(OutageCause::KeyUnavailable));
        assert_eq!(meaning("an error without a name", 502, "Encrypt"), outage(OutageCause::Unreachable));
        assert_eq!(meaning("ExpiredTokenException", 400, "Encrypt"), outage(OutageCause::Credentials));
        assert_eq!(meaning("SomethingNew", 418, "Encrypt"), outage(OutageCause::Credentials));
    }
}
