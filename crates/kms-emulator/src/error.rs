//! The errors of AWS KMS, with the HTTP status, type and wording of the real one.

use std::fmt;

/// An error as AWS KMS reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsError {
    code: &'static str,
    message: Option<String>,
    status: u16,
}

impl KmsError {
    /// AWS's name of the error, such as `DisabledException`.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// AWS's message; some errors (`InvalidCiphertextException`) have none.
    pub fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    /// The HTTP status that the error travels with.
    pub fn status(&self) -> u16 {
        self.status
    }
}

impl fmt::Display for KmsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => write!(f, "{}: {message}", self.code),
            None => f.write_str(self.code),
        }
    }
}

impl std::error::Error for KmsError {}

/// Each error that carries a message of the caller's making, with its AWS name.
macro_rules! client_errors {
    ($($name:ident => $code:literal,)*) => {
        impl KmsError {
            $(pub(crate) fn $name(message: impl Into<String>) -> Self {
                Self { code: $code, message: Some(message.into()), status: 400 }
            })*
        }
    };
}

client_errors! {
    access_denied => "AccessDeniedException",
    already_exists => "AlreadyExistsException",
    dry_run => "DryRunOperationException",
    expired_token => "ExpiredTokenException",
    incorrect_key => "IncorrectKeyException",
    invalid_alias_name => "InvalidAliasNameException",
    invalid_arn => "InvalidArnException",
    invalid_key_usage => "InvalidKeyUsageException",
    invalid_marker => "InvalidMarkerException",
    invalid_signature => "InvalidSignatureException",
    invalid_state => "KMSInvalidStateException",
    limit_exceeded => "LimitExceededException",
    malformed_policy => "MalformedPolicyDocumentException",
    not_authorized => "NotAuthorizedException",
    not_found => "NotFoundException",
    serialization => "SerializationException",
    tag => "TagException",
    unrecognized_client => "UnrecognizedClientException",
    unsupported => "UnsupportedOperationException",
    validation => "ValidationException",
}

impl KmsError {
    pub(crate) fn missing_token() -> Self {
        let message = Some("Missing Authentication Token".to_owned());
        Self { code: "MissingAuthenticationTokenException", message, status: 400 }
    }

    pub(crate) fn incomplete_signature(message: impl Into<String>) -> Self {
        Self { code: "IncompleteSignatureException", message: Some(message.into()), status: 400 }
    }

    pub(crate) fn unknown_operation() -> Self {
        Self { code: "UnknownOperationException", message: None, status: 400 }
    }

    /// AWS says nothing about why a ciphertext does not open.
    pub(crate) fn invalid_ciphertext() -> Self {
        Self { code: "InvalidCiphertextException", message: None, status: 400 }
    }

    pub(crate) fn disabled(key_arn: &str) -> Self {
        Self { code: "DisabledException", message: Some(format!("{key_arn} is disabled.")), status: 400 }
    }

    pub(crate) fn throttled() -> Self {
        let message =
            "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.";
        Self { code: "ThrottlingException", message: Some(message.to_owned()), status: 400 }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self { code: "KMSInternalException", message: Some(message.into()), status: 500 }
    }

    pub(crate) fn dependency_timeout() -> Self {
        let message = Some("The system timed out while trying to fulfill the request.".to_owned());
        Self { code: "DependencyTimeoutException", message, status: 500 }
    }

    pub(crate) fn key_unavailable(message: impl Into<String>) -> Self {
        Self { code: "KeyUnavailableException", message: Some(message.into()), status: 500 }
    }

    pub(crate) fn service_unavailable() -> Self {
        let message = Some("The service is temporarily unable to handle the request.".to_owned());
        Self { code: "ServiceUnavailableException", message, status: 503 }
    }

    /// AWS's answer to a parameter that is required and absent.
    pub(crate) fn missing(parameter: &str) -> Self {
        Self::validation(format!(
            "1 validation error detected: Value null at '{parameter}' failed to satisfy constraint: \
             Member must not be null"
        ))
    }

    /// AWS's answer to a parameter whose value is out of its range or set.
    pub(crate) fn constraint(parameter: &str, value: impl fmt::Display, constraint: &str) -> Self {
        Self::validation(format!(
            "1 validation error detected: Value '{value}' at '{parameter}' failed to satisfy constraint: \
             Member must {constraint}"
        ))
    }
}
