// A field, a file and a batch with Java's own HTTP client.
// Usage: java Recipes.java FILE, with KEYFOLD_URL and KEYFOLD_API_KEY set.
//
// It sends the whole body before it reads the answer. The service holds back an answer of up to 1 MiB, so that files
// below that size go through like this; larger ones need a client that does both at once, or `keyfold encrypt FILE`.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.time.Duration;
import java.util.Base64;
import java.util.regex.Pattern;

public final class Recipes {
    private static final String URL = System.getenv("KEYFOLD_URL");
    private static final long FILE_BYTES_MAX = 1_000_000;
    private static final HttpClient CLIENT =
        HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(10)).build();

    public static void main(String[] args) throws Exception {
        field();
        batch();
        Path file = Path.of(args[0]);
        require(Files.size(file) <= FILE_BYTES_MAX, "the file is larger than " + FILE_BYTES_MAX + " bytes");
        Path sealed = Path.of(args[0] + ".kf");
        stream("/v1/encrypt", file, sealed);
        stream("/v1/decrypt", sealed, Path.of(args[0] + ".out"));
        System.out.println("field, file and batch: done");
    }

    private static void field() throws Exception {
        // The context binds the ciphertext to its row: it opens nowhere else.
        String context = "{\"table\": \"people\", \"column\": \"name\", \"row\": \"42\"}";
        String plaintext = base64("Ada Lovelace");
        String sealed = call("/v1/encrypt", "{\"plaintext\": \"" + plaintext + "\", \"context\": " + context + "}");
        String opened = call("/v1/decrypt",
            "{\"ciphertext\": \"" + member(sealed, "ciphertext") + "\", \"context\": " + context + "}");
        require(member(opened, "plaintext").equals(plaintext), opened);
    }

    private static void batch() throws Exception {
        StringBuilder items = new StringBuilder();
        for (int n = 0; n < 1000; n++) {
            items.append(n == 0 ? "" : ",").append("{\"ref\": \"row-").append(n)
                .append("\", \"plaintext\": \"").append(base64(Integer.toString(n))).append("\"}");
        }
        // Each item has its own outcome: "ciphertext", or "error" with a code.
        String answer = call("/v1/encrypt/batch", "{\"items\": [" + items + "]}");
        require(answer.endsWith("\"failed\":0}"), answer.substring(answer.length() - 20));
    }

    private static void stream(String path, Path source, Path target) throws Exception {
        HttpRequest request = request(path, "application/octet-stream")
            .header("Keyfold-Context", "name=\"report\"").timeout(Duration.ofSeconds(60))
            .POST(HttpRequest.BodyPublishers.ofFile(source)).build();
        Path part = Path.of(target + ".part");
        // A broken transfer throws here, and the file never gets its name.
        HttpResponse<Path> response = CLIENT.send(request, HttpResponse.BodyHandlers.ofFile(part));
        require(response.statusCode() == 200, path + " answers " + response.statusCode());
        Files.move(part, target, StandardCopyOption.REPLACE_EXISTING);
    }

    private static String call(String path, String json) throws Exception {
        HttpRequest request = request(path, "application/json").timeout(Duration.ofSeconds(60))
            .POST(HttpRequest.BodyPublishers.ofString(json)).build();
        HttpResponse<String> response = CLIENT.send(request, HttpResponse.BodyHandlers.ofString());
        require(response.statusCode() == 200, response.body());
        return response.body();
    }

    private static HttpRequest.Builder request(String path, String type) {
        return HttpRequest.newBuilder(URI.create(URL + path)).header("Content-Type", type)
            .header("Authorization", "Bearer " + System.getenv("KEYFOLD_API_KEY"));
    }

    private static String base64(String text) {
        return Base64.getEncoder().encodeToString(text.getBytes(StandardCharsets.UTF_8));
    }

    /** A member that holds no escapes: base64, envelopes and ids never do. Use your JSON library. */
    private static String member(String json, String name) {
        var matcher = Pattern.compile("\"" + name + "\":\"([^\"]*)\"").matcher(json);
        require(matcher.find(), json);
        return matcher.group(1);
    }

    private static void require(boolean condition, String otherwise) {
        if (!condition) {
            throw new IllegalStateException(otherwise);
        }
    }
}
