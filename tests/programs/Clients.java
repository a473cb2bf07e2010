import java.io.*;
import java.sql.*;
import java.util.*;
import org.postgresql.PGConnection;
import org.postgresql.copy.CopyManager;

/** pgJDBC: prints what it sees of ordinary traffic, or (arguments: jobs, calls) of jobs. */
public class Clients {
    static void say(Object... values) { System.out.println(Arrays.deepToString(values)); }

    interface Action { void run() throws Exception; }

    static void failure(Action action) throws Exception {
        try {
            action.run();
            say("no failure");
        } catch (SQLException error) {
            say(error.getSQLState(), error.getMessage());
        }
    }

    static int rows(ResultSet result) throws SQLException {
        int count = 0;
        while (result.next()) count++;
        return count;
    }

    static void traffic(Connection conn) throws Exception {
        try (Statement statement = conn.createStatement()) {
            ResultSet result = statement.executeQuery(
                "SELECT 1, 'x', NULL, 1.5::numeric, ARRAY[1, 2], '2001-02-03'::date, true, '\\x00ff'::bytea");
            result.next();
            for (int i = 1; i <= 7; i++)
                say(result.getMetaData().getColumnTypeName(i), result.getString(i));
            boolean more = statement.execute("SELECT 1; UPDATE pg_class SET relname = relname WHERE false; SELECT 2");
            while (more || statement.getUpdateCount() != -1) {
                say(more ? rows(statement.getResultSet()) : statement.getUpdateCount());
                more = statement.getMoreResults();
            }
            statement.execute("CREATE TABLE t (a int PRIMARY KEY, b text)");
            statement.execute("DO $$ BEGIN RAISE NOTICE 'n'; END $$");
            say(statement.getWarnings());
            failure(() -> statement.execute("SELECT none"));
            failure(() -> statement.execute("SELECT pg_background_none('x')"));
        }
        // Named on the server from the fifth on, and binary: as one of a batch, and alone.
        try (PreparedStatement insert = conn.prepareStatement("INSERT INTO t VALUES (?, ?)",
                Statement.RETURN_GENERATED_KEYS)) {
            for (int i = 0; i < 1500; i++) {
                insert.setInt(1, i);
                insert.setString(2, "x".repeat(i % 100));
                insert.addBatch();
            }
            say(Arrays.stream(insert.executeBatch()).sum(), rows(insert.getGeneratedKeys()));
            failure(() -> { insert.setInt(1, 1); insert.setString(2, null); insert.executeUpdate(); });
        }
        try (PreparedStatement select = conn.prepareStatement("SELECT a, b, ?::timestamptz FROM t WHERE a = ?")) {
            for (int turn = 0; turn < 12; turn++) {
                select.setTimestamp(1, new Timestamp(0));
                select.setInt(2, turn);
                ResultSet result = select.executeQuery();
                result.next();
                say(result.getInt(1), result.getString(2), result.getTimestamp(3).getTime());
            }
        }
        conn.setAutoCommit(false);
        try (PreparedStatement select = conn.prepareStatement("SELECT * FROM t ORDER BY a")) {
            select.setFetchSize(70);
            for (int turn = 0; turn < 7; turn++) {
                ResultSet result = select.executeQuery();
                if (turn % 2 == 1) { result.next(); result.close(); } else { say(rows(result)); }
            }
        }
        Savepoint savepoint = conn.setSavepoint("s");
        failure(() -> conn.createStatement().execute("SELECT 1/0"));
        failure(() -> conn.createStatement().execute("SELECT 1"));
        conn.rollback(savepoint);
        conn.commit();
        conn.setAutoCommit(true);
        CopyManager copies = conn.unwrap(PGConnection.class).getCopyAPI();
        StringBuilder lines = new StringBuilder();
        for (int i = 5000; i < 15000; i++) lines.append(i).append("\tpg_background_launch(1)\n");
        say(copies.copyIn("COPY t FROM STDIN", new StringReader(lines.toString())));
        StringWriter copied = new StringWriter();
        say(copies.copyOut("COPY t TO STDOUT", copied), copied.toString().hashCode());
        failure(() -> copies.copyIn("COPY t FROM STDIN", new StringReader("x\n")));
        try (Statement listen = conn.createStatement()) {
            listen.execute("LISTEN c");
            listen.execute("NOTIFY c, 'p'");
            for (var notification : conn.unwrap(PGConnection.class).getNotifications(5000))
                say(notification.getName(), notification.getParameter());
        }
        DatabaseMetaData about = conn.getMetaData();
        ResultSet columns = about.getColumns(null, "public", "t", null);
        while (columns.next()) say(columns.getString("COLUMN_NAME"), columns.getString("TYPE_NAME"));
        say(rows(about.getPrimaryKeys(null, null, "t")), rows(about.getTables(null, null, "pg_c%", null)));
        cancelled(conn, "SELECT pg_sleep(60)");
        try (Statement slow = conn.createStatement()) {
            slow.setQueryTimeout(1);
            failure(() -> slow.execute("SELECT pg_sleep(60)"));
        }
        say(conn.isValid(5));
    }

    /** Runs a query that does not end, and cancels it from another thread. */
    static void cancelled(Connection conn, String query) throws Exception {
        try (Statement statement = conn.createStatement()) {
            Thread canceller = new Thread(() -> {
                try { Thread.sleep(700); statement.cancel(); } catch (Exception error) { say(error); }
            });
            canceller.start();
            failure(() -> statement.executeQuery(query));
            canceller.join(10000);
        }
    }

    static int launch(Connection conn, String job) throws SQLException {
        try (Statement statement = conn.createStatement()) {
            ResultSet result = statement.executeQuery("SELECT pg_background_launch('" + job + "')");
            result.next();
            return result.getInt(1);
        }
    }

    static void jobs(Connection conn) throws Exception {
        try (PreparedStatement launch = conn.prepareStatement("SELECT pg_background_launch(?)");
             PreparedStatement fetch = conn.prepareStatement(
                "SELECT n, t FROM pg_background_result(?) AS (n int, t text)")) {
            for (int turn = 0; turn < 12; turn++) {
                launch.setString(1, "SELECT " + turn + " AS n, 'x'::text");
                ResultSet launched = launch.executeQuery();
                launched.next();
                fetch.setInt(1, launched.getInt(1));
                ResultSet result = fetch.executeQuery();
                while (result.next()) say(result.getInt(1), result.getString(2));
            }
        }
        conn.setAutoCommit(false);
        try (PreparedStatement fetch = conn.prepareStatement(
                "SELECT * FROM pg_background_result(?) AS (n int)")) {
            fetch.setFetchSize(70);
            for (int turn = 0; turn < 7; turn++) {
                fetch.setInt(1, launch(conn, "SELECT generate_series(1, 1000)"));
                say(rows(fetch.executeQuery()));
            }
        }
        conn.commit();
        conn.setAutoCommit(true);
        int pid = launch(conn, "SELECT pg_sleep(60)");
        cancelled(conn, "SELECT * FROM pg_background_result(" + pid + ") AS (t text)");
        try (Statement statement = conn.createStatement()) {
            say(rows(statement.executeQuery("SELECT pg_terminate_backend(" + pid + ")")));
        }
        int failing = launch(conn, "SELECT 1/0");
        failure(() -> conn.createStatement().executeQuery(
            "SELECT * FROM pg_background_result(" + failing + ") AS (n int)"));
        int detached = launch(conn, "SELECT 1");
        say(rows(conn.createStatement().executeQuery("SELECT pg_background_detach(" + detached + ")")));
    }

    /** The escapes for calls, and one statement for results of different columns. */
    static void calls(Connection conn) throws Exception {
        try (CallableStatement launch = conn.prepareCall("{? = call pg_background_launch(?)}");
             CallableStatement detach = conn.prepareCall("{call pg_background_detach(?)}")) {
            for (int turn = 0; turn < 7; turn++) {
                launch.registerOutParameter(1, Types.INTEGER);
                launch.setString(2, "SELECT " + turn);
                launch.execute();
                detach.setInt(1, launch.getInt(1));
                say(detach.execute());
            }
        }
        String[] jobs = {"SELECT 1 AS n", "SELECT text(true) AS t", "SELECT 2.5 AS f, true AS b"};
        String[] values = {"1", "true", "2.5"};
        try (PreparedStatement fetch = conn.prepareStatement("SELECT * FROM pg_background_result(?)")) {
            for (int turn = 0; turn < 24; turn++) {
                int job = turn < 12 ? 0 : turn % 3;
                fetch.setInt(1, launch(conn, jobs[job]));
                try {
                    ResultSet result = fetch.executeQuery();
                    result.next();
                    say(values[job].equals(result.getString(1)) ? "right" : "wrong");
                } catch (SQLException error) {
                    say(error.getSQLState(), error.getMessage());
                }
            }
        }
    }

    public static void main(String[] args) throws Exception {
        String url = "jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/"
            + System.getenv("PGDATABASE") + "?user=postgres&sslmode=disable&connectTimeout=10" + args[1];
        try (Connection conn = DriverManager.getConnection(url)) {
            switch (args[0]) {
                case "jobs": jobs(conn); break;
                case "calls": calls(conn); break;
                default: traffic(conn);
            }
        }
    }
}
