//! As much of STS as assuming a role takes: AssumeRole, AssumeRoleWithWebIdentity and GetCallerIdentity, in
//! the query protocol.

use std::collections::HashMap;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, StatusCode};
use uuid::Uuid;

use super::wire::WireControl;
use super::{Shared, faulty};
use crate::calls::Arrival;
use crate::directory::{Caller, KnownRole, new_access_key, session_arn};
use crate::engine::Session;
use crate::error::KmsError;

type Form = HashMap<String, String>;

const WITH_WEB_IDENTITY: &str = "AssumeRoleWithWebIdentity";

pub(super) fn is_form(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|value| value.starts_with("application/x-www-form-urlencoded"))
}

pub(super) async fn serve(shared: &Shared, wire: &WireControl, headers: &HeaderMap, body: &[u8]) -> Response {
    let form = parse_form(body);
    let operation = form.get("Action").cloned().unwrap_or_default();
    // Who comes with a web identity has no credentials yet.
    let caller = match shared.engine.identify(headers, "sts") {
        Ok(caller) => Some(caller),
        Err(_) if operation == WITH_WEB_IDENTITY => None,
        Err(error) => return render(&operation, Err(faulty::refused(shared, &operation, error))),
    };
    let mut arrival = Arrival { operation: operation.clone(), ..Arrival::default() };
    if let Some(Caller { region, account, principal, .. }) = caller.clone() {
        arrival = Arrival { region, account, principal, ..arrival };
    }
    let call = || match (operation.as_str(), &caller) {
        ("AssumeRole", Some(caller)) => {
            let external_id = form.get("ExternalId").map(String::as_str);
            assume_role(shared, &form, &caller.principal, |role| role.trusts(caller, external_id))
        }
        (WITH_WEB_IDENTITY, _) => {
            let token = form.get("WebIdentityToken").map(String::as_str);
            assume_role(shared, &form, "anonymous", |role| role.trusts_token(token))
        }
        ("GetCallerIdentity", Some(caller)) => Ok(caller_identity(caller)),
        _ => Err(KmsError::unknown_operation()),
    };
    faulty::run(shared, wire, arrival, call, |result| render(&operation, result)).await
}

fn assume_role(
    shared: &Shared,
    form: &Form,
    who: &str,
    trusts: impl FnOnce(&KnownRole) -> bool,
) -> Result<String, KmsError> {
    let required = |name: &str, parameter| form.get(name).ok_or_else(|| KmsError::missing(parameter));
    let arn = required("RoleArn", "roleArn")?;
    let name = required("RoleSessionName", "roleSessionName")?;
    let seconds: u64 = match form.get("DurationSeconds").map(|text| text.parse()) {
        None => 3600,
        Some(Ok(seconds @ 900..=43_200)) => seconds,
        Some(_) => {
            let constraint = "have value between 900 and 43200";
            return Err(KmsError::constraint("durationSeconds", "", constraint));
        }
    };
    let expires = shared.engine.clock.now().plus(Duration::from_secs(seconds));
    shared.engine.assume_role(|directory, state| {
        // AWS does not tell a missing role, an untrusted caller and a wrong external id apart.
        let role = directory.role(arn).filter(|role| trusts(role)).ok_or_else(|| {
            let message = format!("User: {who} is not authorized to perform: sts:AssumeRole on resource: {arn}");
            KmsError::access_denied(message)
        })?;
        let access_key = new_access_key(random_uuid()?.as_bytes());
        let session = Session {
            token: random_uuid()?.simple().to_string(),
            role_arn: arn.clone(),
            name: name.clone(),
            expires,
        };
        let answer = format!(
            "<AssumedRoleUser><AssumedRoleId>AROAEMULATOR:{name}</AssumedRoleId><Arn>{user}</Arn></AssumedRoleUser>\
             <Credentials><AccessKeyId>{access_key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>\
             <SessionToken>{token}</SessionToken><Expiration>{expires}</Expiration></Credentials>",
            name = escape(name),
            user = escape(&session_arn(arn, &role.account, name)),
            secret = random_uuid()?.simple(),
            token = session.token,
            expires = session.expires.rfc3339(),
        );
        state.sessions.insert(access_key, session);
        Ok(answer)
    })
}

fn caller_identity(caller: &Caller) -> String {
    format!(
        "<Arn>{}</Arn><UserId>EMULATOR</UserId><Account>{}</Account>",
        escape(&caller.principal),
        caller.account
    )
}

fn random_uuid() -> Result<Uuid, KmsError> {
    let mut bytes = [0; 16];
    crate::blob::random(&mut bytes)?;
    Ok(Uuid::from_bytes(bytes))
}

/// STS has its own names for some errors, and other statuses.
fn render(operation: &str, result: Result<String, KmsError>) -> Response {
    let id = Uuid::new_v4();
    let namespace = "https://sts.amazonaws.com/doc/2011-06-15/";
    let (status, body) = match result {
        Ok(answer) => (
            StatusCode::OK,
            format!(
                "<{operation}Response xmlns=\"{namespace}\"><{operation}Result>{answer}</{operation}Result>\
                 <ResponseMetadata><RequestId>{id}</RequestId></ResponseMetadata></{operation}Response>"
            ),
        ),
        Err(error) => {
            let (status, code) = match error.code() {
                "AccessDeniedException" => (403, "AccessDenied"),
                "UnrecognizedClientException" => (403, "InvalidClientTokenId"),
                "ExpiredTokenException" => (403, "ExpiredToken"),
                "MissingAuthenticationTokenException" => (403, "MissingAuthenticationToken"),
                "UnknownOperationException" => (400, "InvalidAction"),
                "ValidationException" => (400, "ValidationError"),
                "ThrottlingException" => (400, "Throttling"),
                "ServiceUnavailableException" => (503, "ServiceUnavailable"),
                _ if error.status() >= 500 => (500, "InternalFailure"),
                code => (error.status(), code),
            };
            let message = escape(error.message().unwrap_or_default());
            let body = format!(
                "<ErrorResponse xmlns=\"{namespace}\"><Error><Type>Sender</Type><Code>{code}</Code>\
                 <Message>{message}</Message></Error><RequestId>{id}</RequestId></ErrorResponse>"
            );
            (StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), body)
        }
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/xml"));
    response
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn parse_form(body: &[u8]) -> Form {
    let body = String::from_utf8_lossy(body);
    let pairs = body.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (percent_decode(name), percent_decode(value))).collect()
}

fn percent_decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = || u8::from_str_radix(std::str::from_utf8(after.get(..2)?).ok()?, 16).ok();
        rest = after;
        match byte {
            b'+' => out.push(b' '),
            b'%' => match hex() {
                Some(decoded) => {
                    out.push(decoded);
                    rest = &after[2..];
                }
                None => out.push(b'%'),
            },
            byte => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let form = parse_form(b"Action=AssumeRole&RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fx&A=b+c%2");
        assert_eq!(form["Action"], "AssumeRole");
        assert_eq!(form["RoleArn"], "arn:aws:iam::1:role/x");
        assert_eq!(form["A"], "b c%2");
    }
}
